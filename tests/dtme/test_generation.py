"""Key-value caches of transformers: whose tokens they hold, how many keys there may be, and what is refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import dtme
from benchmarks.stacks.generation import (
    BART,
    DYNAMIC,
    GPT2,
    LLAMA,
    MISTRAL,
    NO_CACHE,
    T5,
    TASKS,
    Host,
    differ,
    expanded,
    oracle,
    prompts,
    text,
)
from dtme.block.attention import JoinedStreams, OwnTokens, attend, attend_concatenated
from dtme.caches import Sizes
from dtme.streams import adapters

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def llama():
    return expanded(LLAMA)


@pytest.fixture
def ids():
    return prompts(LLAMA, padded=False)["input_ids"]


def dynamic(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def static(model, places=16):
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=places)


def read(model, task, ids, cache=None, **options):
    """A forward without gradients that fills a cache."""
    with torch.no_grad(), dtme.tasks(model, task):
        return model(input_ids=ids, cache=cache, use_cache=True, **options)


# --- whose tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [dynamic, static, lambda model: None], ids=["dynamic", "static", "made by the model"])
def test_a_cache_of_another_task_is_refused(llama, ids, make):
    cache = read(llama, "b", ids, make(llama)).cache
    for other in (cache, copy.deepcopy(cache)):
        with pytest.raises(
            RuntimeError, match=r"holds tokens of \['b'\], and \['a'\] cannot go on with .* a cache of its"
        ):
            read(llama, "a", ids[:, :1], other)
    want = read(llama, "b", torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(read(llama, "b", ids[:, :1], cache).logits, want, rtol=1e-9, atol=1e-9)


def test_a_cache_of_the_plain_model_is_refused(ids):
    model = LLAMA.build()
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {}, {"model.layers.1": ("a",)}))
    for task in TASKS:
        with pytest.raises(RuntimeError, match=rf"tokens that did not run in this .*, and \['{task}'\] cannot go on"):
            read(model, task, ids[:, :1], cache)


def test_a_cache_of_another_plan_is_refused(ids):
    model = LLAMA.build()
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {}, {"model.layers.1": TASKS}))
    cache = read(model, "a", ids).cache
    dtme.collapse(model)
    dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {}, {"model.layers.0": TASKS}))
    with pytest.raises(RuntimeError, match=r"holds tokens of \['a'\], run by another plan"):
        read(model, "a", ids[:, :1], cache)


def test_tasks_that_nothing_tells_apart_share_a_cache(ids):
    model = LLAMA.build()
    plan = dtme.ExpansionPlan(("a", "b", "c"), 2, {}, {"model.layers.1": ("a", "b")}, groups={"ab": ("a", "b")})
    dtme.expand(model, plan)
    cache = read(model, "a", ids).cache
    read(model, "b", ids[:, :1], cache)
    read(model, ["a", "b"], ids[:, :1], cache)
    with pytest.raises(RuntimeError, match=r"holds tokens of \['a'\]"):
        read(model, "c", ids[:, :1], cache)
    with pytest.raises(RuntimeError, match=r"holds the rows of one task: choose it"):
        read(model, ["a", "c"], ids[:, :1], cache)


@pytest.mark.parametrize("make", [dynamic, static], ids=["dynamic", "static"])
def test_an_emptied_cache_goes_to_any_task(llama, ids, make):
    cache, want = make(llama), {task: read(llama, task, ids).logits for task in TASKS}
    for task in ("a", "b", "a"):
        torch.testing.assert_close(read(llama, task, ids, cache).logits, want[task], rtol=1e-9, atol=1e-9)
        read(llama, task, ids[:, :2], cache)
        cache.reset()
    read(llama, "a", ids, cache)
    cache.crop(-ids.shape[1])
    torch.testing.assert_close(read(llama, "b", ids, cache).logits, want["b"], rtol=1e-9, atol=1e-9)


def test_the_encoders_part_of_another_tasks_cache_is_refused():
    from transformers import EncoderDecoderCache

    model, inputs = expanded(BART), prompts(BART, padded=False)
    start = {"decoder_input_ids": torch.full((2, 1), 2)}
    cache = read(model, "b", cache=None, ids=inputs["input_ids"], **start).cache
    mixed = EncoderDecoderCache(dynamic(model), cache.cross_attention_cache)
    with pytest.raises(RuntimeError, match=r"holds tokens of \['b'\], and \['a'\]"):
        read(model, "a", cache=mixed, ids=inputs["input_ids"], **start)


def test_task_keys_are_those_of_the_weights_that_read_the_first_token(ids):
    """They are remembered with the keys of the tokens, and computed anew where those are."""
    model = expanded(LLAMA)
    cache = read(model, "a", ids).cache
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "k_proj" in name or ".dtme.tokens" in name:
                parameter.data.mul_(1.5)  # which no version counter tells
    cache.reset()
    found = [read(model, "a", part, cache).logits for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:])]
    torch.testing.assert_close(torch.cat(found, 1), read(model, "a", ids).logits, rtol=1e-9, atol=1e-9)
    with dtme.tasks(model, "a"):  # differentiated, they are not remembered
        cache = model(ids[:, :4], use_cache=True).cache
        model(ids[:, 4:], cache=cache, use_cache=True).logits.square().mean().backward()
        tokens = adapters(model)[0].tokens["a"]
        found, tokens.grad = tokens.grad, None
        model(ids).logits[:, 4:].square().mean().backward()
    # its norms round to float32
    torch.testing.assert_close(found, tokens.grad, rtol=1e-4, atol=1e-7)


# --- how many keys ----------------------------------------------------------------------------------------------------


def test_keys_that_the_cache_does_not_promise_are_refused(llama, ids, monkeypatch):
    cache = read(llama, "a", ids).cache
    monkeypatch.setattr(cache, "get_mask_sizes", lambda number, layer: (number + 3, 0))
    says = r"not over its own tokens: 1 queries for 8 keys, where its key-value cache says 1 for 4"
    with pytest.raises(ValueError, match=says):
        # a mask of one's own, as transformers asks the cache for the size of one
        read(llama, "a", ids[:, :1], cache, attention_mask=torch.ones(2, 1, 1, 8, dtype=torch.bool))


def test_an_attention_that_does_not_say_which_layer_is_its_own_reads_a_prompt_and_no_more(llama, ids):
    model = copy.deepcopy(llama)
    model.model.layers[0].dtme.site.seam._layer = None
    cache = read(model, "a", ids).cache
    with pytest.raises(ValueError, match=r"1 queries for 8 keys, and it does not say by layer_idx which layer of its"):
        read(model, "a", ids[:, :1], cache)


def test_attention_to_other_tokens_is_refused_with_a_cache_as_without():
    model = expanded(BART)
    attention = model.model.decoder.layers[0].self_attn
    tokens, others = torch.randn(2, 1, 32).double(), torch.randn(2, 7, 32).double()
    seam = adapters(model.model.decoder.layers[0])[0].site.seam
    cache = dynamic(model)
    assert seam.cached_sizes((tokens,), {"cache": cache}) == Sizes(1, 1, cache)
    for arguments in ({}, {"cache": cache}):
        own = OwnTokens("x", True, seam.cached_sizes((tokens,), {"key_value_states": others, **arguments}))
        query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 7, 8)
        with pytest.raises(
            ValueError, match="not over its own tokens: 1 queries for 7 keys" + ", and it is" * bool(arguments)
        ):
            own.check(query, key)
    assert attention.layer_idx == 0


@pytest.mark.parametrize("kind", ["causal", "mask", "bool mask", "row of a mask"])
def test_several_streams_of_one_row_and_more_keys_than_queries(kind):
    """What a batch of rows with their own tasks comes to."""
    torch.manual_seed(0)
    t, heads, n, m, d = 3, 4, 2, 5, 8
    query, key, value = (torch.randn(t, x, y, d).double() for x, y in ((heads, n), (2, m), (2, m)))
    task_kv = tuple(torch.randn(2, 2, 3, d).double() for _ in range(2))
    streams = JoinedStreams("x", t, [0, 2], task_kv)
    masks = {"mask": torch.randn(t, 1, n, m).double(), "bool mask": torch.rand(t, 1, n, m) > 0.3}
    mask = {**masks, "row of a mask": masks["mask"][:1]}.get(kind)
    own = OwnTokens("x", True, Sizes(n, m))
    found = attend(streams, t, own, query, key, value, attn_mask=mask, is_causal=kind == "causal")
    for i in range(t):
        k, v = key[i : i + 1], value[i : i + 1]
        bias = torch.ones(n, m).tril().bool() if mask is None else mask[min(i, len(mask) - 1)][None]
        if i in streams.joined:
            k, v = (
                torch.cat([x, own[None, streams.joined.index(i)]], 2) for x, own in zip((k, v), task_kv, strict=True)
            )
            bias = F.pad(bias, (0, 3), value=bias.dtype == torch.bool)
        want = F.scaled_dot_product_attention(query[i : i + 1], k, v, bias, enable_gqa=True)
        torch.testing.assert_close(found[i : i + 1], want, rtol=1e-10, atol=1e-10)


def test_a_bias_that_is_counted_from_the_last_token_is_refused():
    from transformers import MptConfig, MptModel

    model = MptModel(MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=32, vocab_size=50))
    with pytest.raises(
        ValueError, match=r"block 'blocks.0' .* cannot take task tokens: its bias of a key is counted from"
    ):
        dtme.expand(model, dtme.ExpansionPlan(TASKS, 2, {}, {"blocks.0": TASKS}))


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [LLAMA, GPT2, T5], ids=lambda host: host.name)
def test_eager_attention_and_its_weights(host: Host):
    """Weights of the shared keys, as many as the cache has places for."""
    model = expanded(host)
    model.set_attn_implementation("eager")
    plan = model._dtme.expansion.plan
    state = {name: value for name, value in model.state_dict().items() if ".dtme." in name}
    dtme.collapse(model)
    dtme.expand(model, plan)  # which goes by the implementation that it finds
    model.load_state_dict(state, strict=False)
    inputs, want = prompts(host, padded=True), oracle(host, model, "a")
    known = text(want, inputs, **NO_CACHE)
    with dtme.tasks(model, "a"):
        assert differ(text(model, inputs, **DYNAMIC), known) < 1e-10
        out = model.generate(**inputs, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    weights = (out.attentions if host is not T5 else out.decoder_attentions)[-1][0]
    assert weights.shape[-1] == (9 if host is not T5 else 3)
    assert (weights.sum(-1) < 1 + 1e-6).all() and weights.sum(-1).min() < 0.99


@pytest.mark.parametrize("host", [LLAMA, MISTRAL], ids=lambda host: host.name)
def test_one_exported_task_generates(host: Host):
    model, inputs = expanded(host), prompts(host, padded=True)
    single = dtme.MultiTaskModel(model, dict.fromkeys(TASKS, torch.nn.Identity())).export_task("a").backbone
    with dtme.tasks(model, "a"):
        want = text(model, inputs, **NO_CACHE)
    assert differ(text(single, inputs, **DYNAMIC), want) < 1e-10


def test_task_tokens_that_come_in_by_a_gate():
    model, inputs = expanded(LLAMA), prompts(LLAMA, padded=True)
    plan = model._dtme.expansion.plan
    replanned = dtme.ExpansionPlan(TASKS, 3, dict(plan.modulation), dict.fromkeys(plan.expansion, TASKS))
    dtme.replan(model, replanned, gate_tokens=True)
    gates = [parameter for name, parameter in model.named_parameters() if ".gate." in name]
    with torch.no_grad():
        [gate.fill_(0.4) for gate in gates]
    with dtme.tasks(model, "b"):
        want = text(model, inputs, **NO_CACHE)
        assert gates and differ(text(model, inputs, **DYNAMIC), want) < 1e-10


def test_compiled_steps_of_all_tasks_share_one_graph():
    """That many the plain model has, too. The second task has no task tokens."""
    host = LLAMA._replace(options=LLAMA.options | {"num_hidden_layers": 1})
    model, ids = expanded(host), prompts(host, padded=False)["input_ids"]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    for task in TASKS:
        cache = static(model)
        read(model, task, ids, cache)
        for step in range(1, 4):
            longer = torch.cat([ids, ids[:, :step]], 1)
            given = {"input_ids": longer[:, -1:].clone(), "position_ids": torch.full((2, 1), longer.shape[1] - 1)}
            with torch.no_grad(), dtme.tasks(model, task):
                found = compiled(**given, cache=cache, use_cache=True).logits
            torch.testing.assert_close(found, read(model, task, longer).logits[:, -1:], rtol=1e-9, atol=1e-9)
        other = TASKS[1 - TASKS.index(task)]
        with torch.no_grad(), dtme.tasks(model, other), pytest.raises(RuntimeError, match="holds tokens of"):
            compiled(**given, cache=cache, use_cache=True)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("host", [LLAMA, BART, T5], ids=lambda host: host.name)
@pytest.mark.parametrize("beams", [1, 3])
def test_texts_of_several_tasks_at_once(host: Host, beams):
    """An encoder reads a text once for all its beams, and a decoder begins all texts alike."""
    model, inputs = expanded(host), prompts(host, padded=True)
    options = {"num_beams": beams, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    with dtme.tasks(model, task_of_row=[task for task in TASKS for _ in range(beams)]):
        found = model.generate(**inputs, **options)
    for i, task in enumerate(TASKS):
        with dtme.tasks(model, task):
            want = model.generate(**{name: x[i : i + 1] for name, x in inputs.items()}, **options)
        assert torch.equal(found.sequences[i : i + 1], want.sequences)
        for scores, own in zip(found.scores, want.scores, strict=True) if beams == 1 else ():
            torch.testing.assert_close(scores[i : i + 1], own, rtol=1e-9, atol=1e-9)


def test_texts_of_several_tasks_while_training(llama):
    """The comparison of the first call must not fill the cache."""
    model, inputs = copy.deepcopy(llama), prompts(LLAMA, padded=True)
    options = {"max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    with dtme.tasks(model, task_of_row=TASKS):
        want, found = model.generate(**inputs, **options), model.train().generate(**inputs, **options)
    torch.testing.assert_close(found.scores, want.scores, rtol=1e-9, atol=1e-9)


def test_another_kind_of_call_in_the_middle_of_texts_of_several_tasks(llama, ids):
    """It is compared with a copy of the cache, which remembers the real keys of task tokens."""
    cache, want = dynamic(llama), []
    with torch.no_grad(), dtme.tasks(llama, task_of_row=TASKS):
        llama(ids, cache=cache, use_cache=True)
        found = llama(ids[:, :1], cache=cache, use_cache=True, logits_to_keep=1).logits
    for i, task in enumerate(TASKS):
        want.append(read(llama, task, torch.cat([ids, ids[:, :1]], 1)[i : i + 1]).logits[:, -1:])
    torch.testing.assert_close(found, torch.cat(want), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("has_tokens", [None, True, False], ids=["known task", "any task, with", "any task, without"])
@pytest.mark.parametrize("by", [{"softcap": 1.5}, {"sinks": True}, {"softcap": 1.5, "sinks": True}], ids=str)
def test_scores_that_are_capped_and_keys_without_values(by, has_tokens):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, n, 8).double() for heads, n in ((4, 3), (2, 5), (2, 5)))
    task_kv = tuple(torch.randn(1, 2, 3, 8).double() for _ in range(2))
    sinks = torch.randn(4).double()
    by = {name: sinks if name == "sinks" else value for name, value in by.items()}
    mask = (torch.rand(2, 1, 3, 5) > 0.4) | (torch.arange(5) == 0)
    own, options = OwnTokens("x", True, Sizes(3, 5)), {"attn_mask": mask, "scale": 0.7, **by}
    if has_tokens is None:
        found = attend(JoinedStreams("x", 1, [0], task_kv), 2, own, query, key, value, **options)
    else:
        found = attend_concatenated(torch.tensor([has_tokens]), task_kv, None, own, query, key, value, **options)
    if has_tokens is not False:
        key, value = (
            torch.cat([x, more.expand(2, -1, -1, -1)], 2) for x, more in zip((key, value), task_kv, strict=True)
        )
        mask = F.pad(mask, (0, 3), value=True)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.7
    scores = 1.5 * (scores / 1.5).tanh() if "softcap" in by else scores
    scores = scores.masked_fill(~mask, -torch.inf)
    if "sinks" in by:
        scores = torch.cat([scores, sinks[:, None, None].expand(2, 4, 3, 1)], -1)
    want = scores.softmax(-1)[..., : key.shape[2]] @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
