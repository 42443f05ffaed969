//! Installing packages on the host itself.

use super::Programs;
use crate::cancel::Cancel;
use crate::error::{HostError, HostErrorKind};

pub(super) fn install(
    _programs: &Programs,
    packages: &[&str],
    _cancel: &Cancel,
    _line: &mut dyn FnMut(&str),
) -> Result<(), HostError> {
    Err(HostError::new(
        HostErrorKind::Other,
        "install",
        packages.join(" "),
    ))
}
