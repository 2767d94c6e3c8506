"""The report of a folder of runs: ``folder`` reads it, ``comparison`` compares its arms by seed with ``statistics``,
``tables``, ``figures`` and ``beside`` (the paper's numbers) show that, ``page`` and ``numbers`` put it into files."""
