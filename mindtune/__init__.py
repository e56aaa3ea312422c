"""MindTune's common module: what at least two of the training scripts need, one file one job.

Imports go one way: `cli`, `rng`, `flow`, `diffusion`, `lora_names`, `lora_layouts`, `mapped`, `labels`, `cache`, `meeting`,
`operators` and `buckets` at the bottom, then `devices`, `precision`, `images`, `data`, `metadata`, `folders`, `columns`, `named_files`,
`tables`, `pairs`, `checkpoint`, `hub`, `tracking`, `report`, `adam8bit`, `optim`, `advice`, `zero`, `flux_blocks`, `int8`, `library`,
which imports mindone, `weights`, `configs`, `supported`, `pipelines`, `models`, `lora`, `plan`, `sampling`, `held_out` and `encode`;
`check_data` is a command.
Nothing else here parses flags, nothing imports a script or reads `args`.
"""

import os

# transformers warns on import that PyTorch is missing; here it is meant to be.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.1.0"
