"""Verifiers for anyone's test suite.

:func:`verify_wiring` and :func:`verify_no_forgetting` perturb what must not show, and as a control what
must; :func:`verify_pure`, :func:`verify_state_stable` and :func:`verify_vmap_equals_loop` hold any
function to its contract. Hypothesis strategies are imported by their own name,
``from hatfn.testing import strategies``, and want ``pip install 'hatfn[testing]'``.
"""

from hatfn.testing.contracts import verify_pure, verify_state_stable, verify_vmap_equals_loop
from hatfn.testing.forgetting import verify_no_forgetting
from hatfn.tracing.perturbation import Verification
from hatfn.tracing.verify import verify_wiring

__all__ = [
    "Verification",
    "verify_no_forgetting",
    "verify_pure",
    "verify_state_stable",
    "verify_vmap_equals_loop",
    "verify_wiring",
]
