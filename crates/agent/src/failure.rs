//! How an error of the guest's kernel becomes a [`Failure`] on the wire.

use rustix::io::Errno;
use smolvm_proto::message::{Failure, FailureKind};

/// A failure of a kind that is known where it is noticed.
pub(crate) fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure {
        kind,
        message: message.into(),
    }
}

/// A failure of `doing`, as the kernel explained it.
pub(crate) fn from_errno(doing: &str, errno: Errno) -> Failure {
    Failure {
        kind: kind_of(errno),
        message: format!("{doing}: {errno}"),
    }
}

/// A failure of `doing`, as the standard library explained it.
pub(crate) fn from_io(doing: &str, error: &std::io::Error) -> Failure {
    Failure {
        kind: error.raw_os_error().map_or(FailureKind::Io, |code| {
            kind_of(Errno::from_raw_os_error(code))
        }),
        message: format!("{doing}: {error}"),
    }
}

fn kind_of(errno: Errno) -> FailureKind {
    match errno {
        Errno::NOENT => FailureKind::NotFound,
        Errno::ACCESS | Errno::PERM | Errno::ROFS => FailureKind::PermissionDenied,
        Errno::NOEXEC | Errno::LIBBAD => FailureKind::NotExecutable,
        Errno::NOTDIR => FailureKind::NotADirectory,
        Errno::ISDIR => FailureKind::IsADirectory,
        Errno::EXIST | Errno::NOTEMPTY => FailureKind::AlreadyExists,
        Errno::INVAL | Errno::NAMETOOLONG | Errno::TOOBIG | Errno::LOOP | Errno::XDEV => {
            FailureKind::InvalidInput
        }
        Errno::NOSPC | Errno::DQUOT => FailureKind::NoSpace,
        Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE => FailureKind::TooMany,
        _ => FailureKind::Io,
    }
}
