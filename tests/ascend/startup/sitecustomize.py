"""Python runs this at its start in every process of a rehearsal: names the chip before MindSpore is asked for it."""

import ctypes
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when MindSpore is imported; OpenMP's threads wait actively

import mindspore as ms
from mindspore._c_expression import MSContext

MSContext.get_instance().get_ascend_soc_version()
ctypes.CDLL(str(Path(os.environ["ASCEND_HOME_PATH"], "lib64", "libchip.so"))).name_chip()
# With fewer than five threads, which is what MindSpore takes on a machine of two cores, trained state is copied to the
# host at every step, and small graphs fail.
ms.runtime.dispatch_threads_num(5)
# PyNative's queues would keep several cores busy with waiting. Peaks of memory are measured with them: without them
# PyNative frees tensors later.
if os.environ.get("REHEARSE_ASYNCHRONOUSLY") is None:
    ms.runtime.launch_blocking()
