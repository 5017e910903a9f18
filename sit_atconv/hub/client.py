"""The one way to the hub: its own client, by the token that this client knows, and its errors in one line.

The token comes from HF_TOKEN or from `hf auth login`. It goes into requests alone: into no message, log or file.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from sit_atconv.runtime.errors import InputError, said
from sit_atconv.version import __version__

DATASETS = "datasets/"  # what the name of a dataset begins with on the hub's pages
LOGIN = "log in by `hf auth login`, or set HF_TOKEN"
# The first that an error is of says what the rule and the remedy are.
RULES = (
    (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set in the environment, so that nothing is asked of the hub; unset it"),
    (LocalTokenNotFoundError, f"there is no token of the hub; {LOGIN}"),
    (RevisionNotFoundError, "the repository has no such revision; give a branch, a tag or a commit that it has"),
    (GatedRepoError, "its owner lets in whom he has accepted; ask for access on its page"),
    (
        RepositoryNotFoundError,
        "there is no such repository, or it is private and the token does not open it; mend the name, or give a token "
        "that does",
    ),
    (FileMetadataError, "what answers is no hub; mend HF_ENDPOINT in the environment, or unset it"),
    (LocalEntryNotFoundError, "the hub cannot be reached; try again later"),
)
STATES = {
    401: f"the hub does not know the token; {LOGIN}",
    403: "the token may not do this; give one that may write there",
    409: "somebody else has changed the repository meanwhile; try again",
    413: "a file is too large for the hub",
    429: "the hub was asked too often; try again later",
}


@contextmanager
def asking(about: str) -> Iterator[None]:
    """Within it, what the hub, or the way to it, raises becomes an InputError: `about`, the rule, the remedy."""
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        rule = _rule_of(error)
        if rule is None:
            raise
        raise InputError(f"{about}: {rule}") from None


def _rule_of(error: BaseException) -> str | None:
    """What an error of the hub says, in words of ours; None of one that is not of the hub."""
    for kind, rule in RULES:
        if isinstance(error, kind):
            return rule
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return STATES.get(status, f"the hub answers with status {status}; try again later")
    if isinstance(error, HTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({type(error).__name__}); try again later"
    if isinstance(error, RuntimeError):  # which the client raises of a file that was not sent
        return error.__cause__ and _rule_of(error.__cause__)
    # The client's own errors have no number; those of a disk are told by who writes there.
    return said(error) if isinstance(error, ValueError) or getattr(error, "errno", None) is None else None


def api() -> HfApi:
    """The client of the hub at HF_ENDPOINT, by default https://huggingface.co."""
    return HfApi(library_name="sit_atconv", library_version=__version__)


def check_online(about: str) -> None:
    """Raise InputError where the environment says that nothing may be asked of the hub."""
    with asking(about):
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled


def check_name(repo: str, about: str) -> str:
    """A name of a repository, OWNER/NAME or NAME. Raises InputError for one that the hub does not take."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        raise InputError(
            f"{about}: a repository is OWNER/NAME, of letters, digits and single '-', '_' and '.', 96 at most; mend it"
        ) from None
    return repo


def user(about: str) -> str:
    """The name of the token's owner. Raises InputError where there is no token, or one that the hub does not know."""
    check_online(about)
    with asking(about):
        if get_token() is None:
            raise LocalTokenNotFoundError
        return str(api().whoami()["name"])
