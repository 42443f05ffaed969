//! Not there yet.
use crate::stream::{Last, Stop, Stream};
use smolvm_proto::message::{ArchiveRequest, FailureKind};
pub(crate) fn archive(_: &Stream, _: &ArchiveRequest) -> Result<Last, Stop> {
    Err(crate::failure::failure(FailureKind::Io, "not there yet").into())
}
