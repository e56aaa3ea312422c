"""MindTune: what the training scripts share.

One module has one job. The rooms, from the bottom: `cli`, `files`, `rng`, `flow`, `diffusion`; `distributed`; `data`;
`models`; `encode` and `optim`; `run`; `flags`; and the commands `plan` and `check_data`. A module imports only from its
own room and those below it. docs/design.md says what each module is for.
"""

import os

# transformers warns on import that PyTorch is missing, which is intended here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.2.0"
