"""The signature of a release: OpenSSF Model Signing over its folder, by an EC key that stays where it is.

model-signing does the work (https://github.com/ossf/model-signing-spec). The key is read by the job that signs and
nowhere else; no network is asked, and no log of transparency is written.
"""

import stat
import tempfile
from pathlib import Path

from requant.checksums import SIGNATURE
from requant.errors import RequantError
from requant.records import write_text

CURVES = ("secp256r1", "secp384r1", "secp521r1")
EXPECTED = "expected a PEM file of an EC private key, P-256, without a password"


def check_key(path: str | Path) -> None:
    """Raises RequantError unless `path` is an EC private key that only its owner can read."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    where = f"publish.signing_key: {path}"
    try:
        mode = stat.S_IMODE(Path(path).stat().st_mode)
        if not Path(path).is_file():
            raise RequantError(f"{where}: no file; {EXPECTED}")
        if mode & 0o077:
            raise RequantError(f"{where}: mode {mode:03o}: others can read it; expected 600: chmod 600 {path}")
        key = load_pem_private_key(Path(path).read_bytes(), password=None)
    except OSError as error:
        raise RequantError(f"{where}: {error.strerror}; {EXPECTED}") from None
    except TypeError:
        raise RequantError(f"{where}: has a password; {EXPECTED}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise RequantError(f"{where}: no private key in PEM; {EXPECTED}") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise RequantError(f"{where}: no EC key; {EXPECTED}")
    if key.curve.name not in CURVES:
        raise RequantError(f"{where}: curve {key.curve.name}; {EXPECTED} (P-384 and P-521 will do)")


def sign(folder: Path, key: str | Path) -> None:
    """Writes `folder`/model.sig: of every file in `folder` but itself, hidden ones and folders included."""
    from model_signing import hashing, signing

    check_key(key)
    what = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    signer = signing.Config().set_hashing_config(what).use_elliptic_key_signer(private_key=key)
    with tempfile.TemporaryDirectory() as aside:  # a file beside the others would be taken for one of the release
        signer.sign(folder, Path(aside) / SIGNATURE)
        write_text(folder / SIGNATURE, (Path(aside) / SIGNATURE).read_text(encoding="utf-8"))
