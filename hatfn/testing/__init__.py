"""Verifiers for anyone's test suite: is this wiring sound, has this learner forgotten anything?

Each verifier also runs positive controls, changes that *must* show, so that it can fail.
"""

from hatfn.testing.forgetting import verify_no_forgetting
from hatfn.testing.perturbation import Verification
from hatfn.testing.wiring import verify_wiring

__all__ = ["Verification", "verify_no_forgetting", "verify_wiring"]
