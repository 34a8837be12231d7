"""All of the plugin, registered with fairseq: what ``--user-dir admin_fairseq`` means, and the public face."""

import logging
import os

from admin_fairseq.errors import AdminError, install_excepthook, is_running  # noqa: F401

if is_running("fairseq_cli"):
    install_excepthook("fairseq_cli")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else fairseq-hydra-train's hydra prints a traceback itself
_placeholder = logging.NullHandler()  # with one, the modules of fairseq that set up everybody's logging do not
logging.root.addHandler(_placeholder)
try:
    from fairseq.models.transformer import TransformerEncoderBase  # noqa: F401  (new in fairseq 0.12)
except (ImportError, ValueError) as error:  # on Python 3.11 and newer fairseq 0.12.2 raises a ValueError
    raise ImportError(
        "admin_fairseq needs fairseq 0.12 or newer, and none can be imported here"
        f" ({str(error)[:100]}): pip install fairseq-fixed==0.12.3.1, or fairseq==0.12.2 on Python 3.8 to 3.10"
    ) from error
finally:
    logging.root.removeHandler(_placeholder)

from admin_fairseq import hooks, methods, norms_in_front, optim, two_streams  # noqa: E402, F401  (they register themselves)
from admin_fairseq.architectures import register_method  # noqa: E402, F401
from admin_fairseq.model import AdminLanguageModel, AdminModel, AdminTransformer  # noqa: E402, F401
from admin_fairseq.norm import OmegaLayerNorm  # noqa: E402, F401
from admin_fairseq.omega import register_start, sub_layers  # noqa: E402, F401
from admin_fairseq.profile_file import Profile, read_profile  # noqa: E402, F401
from admin_fairseq.profiling import Sample, profile  # noqa: E402, F401
from admin_fairseq.rules import Rule  # noqa: E402, F401

hooks.install()
