"""Verifiers for your test suite.

:func:`verify_wiring` and :func:`verify_no_forgetting` replace numbers by noise: numbers that must not
change an output and, as a control, numbers that must change it. :func:`verify_pure`,
:func:`verify_state_stable` and :func:`verify_vmap_equals_loop` check any function. The strategies for
hypothesis have a module of their own, ``from hatfn.testing import strategies``, which needs
``pip install 'hatfn[testing]'``.
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
