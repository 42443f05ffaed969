//! Not there yet.
use crate::stream::{Last, Stop, Stream};
use smolvm_proto::message::{ExtractRequest, FailureKind};
pub(crate) fn extract(_: &Stream, _: &ExtractRequest) -> Result<Last, Stop> {
    Err(crate::failure::failure(FailureKind::Io, "not there yet").into())
}
