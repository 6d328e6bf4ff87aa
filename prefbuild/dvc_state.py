"""Tell DVC what a stage's outputs hash to, so that it does not read them again.

DVC keeps the md5 of each file it has read in a database, by the file's path, inode, size and time of change; what is
written there before DVC looks is what it takes. That is no part of DVC's public interface, so whatever goes wrong here is
passed over: DVC then reads the files itself.
Not covered: whether a digest is true. It is what the stage's own process says, in a container too. So only files of
artifacts are told: where DVC has other bytes under an md5, `verify_artifact` refuses them, since the manifest has the sha256.
"""

import logging
from pathlib import Path

from prefbuild.artifact import MANIFEST, list_special
from prefbuild.digests import DIGESTS, Digests, is_of

# To import DVC and open its project takes as long as hashing this many bytes, about half a second.
WORTH_IT = 2**28


def tell_dvc(outputs: list[Path], work: Path, *, worth_it: int = WORTH_IT) -> bool:
    """Save the md5 of each output of a stage that is still the file that was hashed; returns whether that was done.

    The digests are in the stage's work folder, the outputs below the working directory, which is the project. Fewer bytes
    than `worth_it` are left to DVC.
    """
    try:
        if list_special(work / DIGESTS):
            return False  # a stage is not trusted to leave plain files
        artifacts = [output for output in outputs if (output / MANIFEST).is_file()]
        ours = {
            Path(path).absolute(): digest
            for path, digest in Digests(work).files.items()
            if any(Path(path).is_relative_to(output) for output in artifacts)
            and Path(path).is_file()
            and is_of(digest, Path(path))
        }
        if sum(digest.size for digest in ours.values()) < worth_it:
            return False

        from dvc.repo import Repo
        from dvc_data.hashfile.hash_info import HashInfo

        with Repo() as repo:
            repo.state.save_many(
                [(str(path), HashInfo("md5", digest.md5), None) for path, digest in ours.items()], repo.fs
            )
    except Exception:  # of a private interface anything may come, and DVC can do without
        logging.getLogger(__name__).debug("DVC was not told", exc_info=True)
        return False
    return True
