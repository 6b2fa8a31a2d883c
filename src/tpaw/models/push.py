"""Send a checkpoint of a run to the Hugging Face Hub, as one commit."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpaw.errors import HubError, InputError, first_line, printable
from tpaw.models.export import Dtype, export
from tpaw.models.references import Checkpoint, find_checkpoint, find_in_run
from tpaw.runtime.progress import note
from tpaw.storage.failures import readable_size

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# The Hub puts it into every new repository.
_ATTRIBUTES = ".gitattributes"


class Destination:
    """A repository of the Hub that a checkpoint may be sent to.

    Args:
        repository: ORG/NAME.
        private: whether the repository must be private.

    Raises:
        InputError: the id is malformed, or there is no token.
    """

    def __init__(self, repository: str, *, private: bool) -> None:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        shown = printable(repository)
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise InputError(f"{shown}: not the id of a repository: {error}") from None
        if repository.count("/") != 1:
            raise InputError(
                f"{shown}: not the id of a repository; it must be ORG/NAME, where ORG is your "
                "user name or an organization"
            )
        if get_token() is None:
            raise InputError(
                "no token for the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN to a "
                "token that may write"
            )
        self.repository = repository
        self._private = private
        self._commit: str | None = None
        self._files: list[str] = []
        self._exists = False
        self._api: HfApi = HfApi()

    def check(self, tag: str) -> None:
        """Ask the Hub about the token and the repository. Nothing is changed.

        Args:
            tag: the files of a repository are replaced only if its model card has this tag.

        Raises:
            InputError: the repository has files of something else, or it is public although it
                must be private.
            HubError: the Hub does not answer, or refuses the token.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        with _hub(f"{self.repository}: the Hub cannot be asked"):
            self._api.whoami()
            try:
                found = self._api.model_info(self.repository)
            except RepositoryNotFoundError:
                return
        self._exists, self._commit = True, found.sha
        self._files = [f.rfilename for f in found.siblings or () if f.rfilename != _ATTRIBUTES]
        if self._files and tag not in (found.tags or ()):
            raise InputError(
                f"{self.repository}: the repository has files, and its model card does not have "
                f"the tag {tag}, so something else made them; choose another name, or delete the "
                "files"
            )
        if self._private and not found.private:
            raise InputError(
                f"--private: {self.repository} exists and is public; make it private in its "
                "settings, or choose another name"
            )

    def create(self) -> None:
        """Create the repository, if there is none.

        Raises:
            HubError: the Hub refuses it, for example because the token may not write there.
        """
        if not self._exists:
            with _hub(f"{self.repository}: the repository cannot be created"):
                self._api.create_repo(self.repository, private=self._private or None)

    def send(self, folder: Path, message: str) -> str:
        """Replace all files of the repository by those of a folder, in one commit.

        Returns:
            The address of the commit.

        Raises:
            HubError: it failed. The repository is as before.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        operations = [CommitOperationAdd(name, folder / name) for name in names]
        gone = [CommitOperationDelete(name) for name in self._files if name not in names]
        with _hub(f"{self.repository}: the upload failed"):
            found = self._api.create_commit(
                self.repository,
                [*operations, *gone],
                commit_message=message,
                parent_commit=self._commit,  # refused if somebody else was faster
            )
        return str(found.commit_url)


def find_to_push(reference: str, *, merge: bool, trust: bool) -> Checkpoint:
    """Find a checkpoint that can be sent.

    Args:
        reference: RUN or RUN@i.
        merge: whether an adapter is sent as an ordinary model.
        trust: whether a run may ask for `model.trust_remote_code`.

    Raises:
        InputError: the reference names no checkpoint that a run has trained, or its weights were
            removed, or it is an adapter over a base that is not on the Hub.
    """
    if (found := find_in_run(reference)) is None:
        raise InputError(
            f"{printable(reference)}: not a checkpoint of a run; give RUN or RUN@i. A model that "
            "no run has trained is sent by `hf upload`"
        )
    if found[1] == 0:
        raise InputError(
            f"{printable(reference)}: θ_0 is the model that the run began with; give a checkpoint "
            "that the run has trained, such as RUN@1"
        )
    checkpoint = find_checkpoint(reference, trust=trust)
    base = checkpoint.player.base
    if base is not None and base.revision is None and not merge:
        raise InputError(
            f"{checkpoint.name}: an adapter over a base that is not on the Hub, which nobody else "
            "could load; add --merge to send an ordinary model"
        )
    return checkpoint


def push(
    checkpoint: Checkpoint, destination: Destination, dtype: Dtype, *, merge: bool, card: str
) -> str:
    """Export a checkpoint into a temporary folder and send it. The run is only read.

    Args:
        checkpoint: the checkpoint.
        destination: the repository.
        dtype: type of the weights.
        merge: as in `export`.
        card: the model card.

    Returns:
        The address of the commit.

    Raises:
        HubError: the Hub refused something or did not answer. After a failed upload the folder is
            kept, and the error names it.
    """
    destination.create()
    temporary = Path(tempfile.mkdtemp(prefix="tpaw-push-"))
    try:
        folder = temporary / "model"
        export(checkpoint, folder, dtype, merge=merge, card=card)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        note(f"upload {readable_size(size)} to {destination.repository}")
        url = destination.send(folder, f"{checkpoint.name} in {dtype}")
    except HubError as error:
        raise HubError(
            f"{error}. The exported model is kept in {folder}. Run the same command again, or "
            f"`hf upload {destination.repository} {folder}`"
        ) from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)
    return url


@contextlib.contextmanager
def _hub(what: str) -> Iterator[Any]:
    """Turn whatever the Hub's client raises into one error."""
    try:
        yield
    except Exception as error:  # of its own, of its HTTP library, or of Python
        cause = error.__cause__ if isinstance(error, RuntimeError) else None
        reason = " ".join(str(cause or error).split()) or first_line(error)
        raise HubError(f"{what} ({printable(reason, 300)})") from None
