//! How an error of the guest's kernel becomes a [`Failure`] on the wire.

use std::io;

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
pub(crate) fn from_io(doing: &str, error: &io::Error) -> Failure {
    Failure {
        kind: match error.raw_os_error() {
            Some(code) => kind_of(Errno::from_raw_os_error(code)),
            // Wrapped by the `tar` crate, which keeps the kind.
            None => kind_of_wrapped(error.kind()),
        },
        message: format!("{doing}: {error}"),
    }
}

fn kind_of_wrapped(kind: io::ErrorKind) -> FailureKind {
    match kind {
        io::ErrorKind::NotFound => FailureKind::NotFound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            FailureKind::PermissionDenied
        }
        io::ErrorKind::NotADirectory => FailureKind::NotADirectory,
        io::ErrorKind::IsADirectory => FailureKind::IsADirectory,
        io::ErrorKind::AlreadyExists | io::ErrorKind::DirectoryNotEmpty => {
            FailureKind::AlreadyExists
        }
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FailureKind::NoSpace,
        io::ErrorKind::InvalidInput
        | io::ErrorKind::InvalidData
        | io::ErrorKind::InvalidFilename
        | io::ErrorKind::UnexpectedEof => FailureKind::InvalidInput,
        _ => FailureKind::Io,
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
        Errno::CONNREFUSED => FailureKind::Refused,
        Errno::HOSTUNREACH
        | Errno::NETUNREACH
        | Errno::NETDOWN
        | Errno::HOSTDOWN
        | Errno::TIMEDOUT
        | Errno::ADDRNOTAVAIL
        | Errno::AFNOSUPPORT => FailureKind::Unreachable,
        Errno::ADDRINUSE => FailureKind::AddressInUse,
        Errno::AGAIN | Errno::NOMEM | Errno::MFILE | Errno::NFILE => FailureKind::TooMany,
        _ => FailureKind::Io,
    }
}
