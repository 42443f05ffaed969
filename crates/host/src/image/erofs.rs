//! An EROFS image from a tar stream.

use std::io::{self, Read, Seek, Write};

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Length of the image in bytes, a multiple of 4096.
    pub bytes: u64,
    /// Number of inodes.
    pub inodes: u64,
}

/// Writes the tree in `tar`, an uncompressed tar stream, as an EROFS image to `image`, from its
/// current position 0.
///
/// # Errors
///
/// Those of reading and writing; [`InvalidData`](io::ErrorKind::InvalidData) if the stream is no
/// tar archive or leaves its root.
pub fn write_erofs(_tar: impl Read, _image: impl Write + Seek) -> io::Result<Written> {
    Err(io::ErrorKind::Unsupported.into())
}
