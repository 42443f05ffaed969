//! Not there yet.
use crate::stream::{Last, Stop, Stream};
use smolvm_proto::message::{FailureKind, ListRequest};
pub(crate) fn list(_: &Stream, _: &ListRequest) -> Result<Last, Stop> {
    Err(crate::failure::failure(FailureKind::Io, "not there yet").into())
}
