"""Low-rank adapters of PEFT, before and after a model is expanded."""
