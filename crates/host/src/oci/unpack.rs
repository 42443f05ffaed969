//! From layers to one root file system.

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use super::digest::{Digest, Hashing};
use super::spec::{ImageConfig, corrupt};
use crate::cancel::Cancel;
use crate::error::HostError;
use crate::image::Image;
use crate::image::build::{Cancellable, DPKG_STATUS, Description, describe};
use crate::image::erofs::{Builder, Limits, Special, TooMuch};
use crate::os::Os;
use crate::staging::Staging;

/// What helps if an image is larger than expected, and is to be trusted all the same.
pub(super) const LIMITS_HINT: &str =
    "If the image comes from somebody you trust, raise the limit with --max-size or --max-entries.";

/// Bytes read at once.
const BUFFER: usize = 1 << 16;

/// An image to make from layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OciRequest<'a> {
    /// The image's name, copied into its description.
    pub name: &'a str,
    /// The time, RFC 3339, copied into the image's description.
    pub created: &'a str,
    /// Where it came from, for people; copied into the image's description.
    pub source: &'a str,
    /// What the image says of its commands. The working directory is made if no layer has it.
    pub config: &'a ImageConfig,
    /// What the layers may come to together.
    pub limits: Limits,
}

/// Opens a layer's bytes.
pub(super) type Open<'a> = Box<dyn FnOnce() -> Result<Box<dyn Read + 'a>, HostError> + 'a>;

/// A layer.
pub struct Layer<'a> {
    /// Bytes as they lie there, compressed or not.
    pub(super) open: Open<'a>,
    /// What names it in errors: its digest, if it has one.
    pub(super) what: String,
    /// Digest of these bytes, if known.
    pub(super) digest: Option<Digest>,
    /// How many they are.
    pub(super) size: u64,
    /// Digest of the uncompressed bytes.
    pub(super) diff_id: Digest,
}

impl std::fmt::Debug for Layer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer")
            .field("what", &self.what)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// Makes an image of layers, the lowest first, and puts it at `dest`, which must not exist.
/// `progress` is told how many bytes of all layers are read, and how many there are.
///
/// A layer is gzip, zstd or plain, as its first bytes tell. Its digests, of the bytes as they are and
/// of the uncompressed ones, are checked before the image has its place.
///
/// # Errors
///
/// [`Corrupt`](crate::HostErrorKind::Corrupt) if a layer is not what its digest says, is no tar archive, cannot be
/// part of a root file system, or unpacks to more than the limits allow;
/// [`AlreadyExists`](crate::HostErrorKind::AlreadyExists) if `dest` does;
/// [`NoSpace`](crate::HostErrorKind::NoSpace); [`Interrupted`](crate::HostErrorKind::Interrupted) if
/// cancelled. Nothing remains at `dest` then.
pub fn unpack_image(
    os: &Os,
    layers: Vec<Layer<'_>>,
    request: &OciRequest<'_>,
    dest: &Path,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Image, HostError> {
    let staging = Staging::begin(os, dest)?;
    let path = staging.dir().join("root.erofs");
    let file = os.create_file("create the image", &path, 0o600)?;
    let special = Special {
        capture: &[DPKG_STATUS],
        // Each sandbox writes its own (machine-id(5)).
        empty: &["etc/machine-id"],
    };
    let total = layers.iter().map(|layer| layer.size).sum();
    let mut read = 0;
    let mut left = request.limits.bytes;
    let written = os.effect("write the image", &path, || {
        let mut builder = Builder::new(&file, special, request.limits)?;
        for layer in layers {
            let size = layer.size;
            let mut told = |bytes: u64| progress(read + bytes.min(size), total);
            left -= apply(&mut builder, layer, left, cancel, &mut told)?;
            read += size;
        }
        if let Some(workdir) = &request.config.workdir {
            builder.directory(workdir)?;
        }
        let written = builder.finish()?;
        file.sync_all()?;
        Ok(written)
    });
    cancel.check("unpack", request.name)?;
    describe(
        os,
        staging,
        dest,
        &Description {
            name: request.name,
            created: request.created,
            source: request.source.to_owned(),
        },
        &written?,
        cancel,
    )
}

/// Applies one layer and checks it. Returns the bytes it has uncompressed, which are `most` at most.
fn apply<W: io::Write + io::Seek>(
    builder: &mut Builder<'_, W>,
    layer: Layer<'_>,
    most: u64,
    cancel: &Cancel,
    progress: &mut dyn FnMut(u64),
) -> Result<u64, HostError> {
    let wrong = || corrupt("unpack", format!("layer {}", layer.what));
    let failed = |error: io::Error| {
        HostError::io("unpack", Path::new(&format!("layer {}", layer.what)), error)
    };
    let raw = (layer.open)()?;
    let mut compressed = Hashing::new(
        Counted {
            inner: Cancellable { inner: raw, cancel },
            progress,
            bytes: 0,
        },
        layer.size,
    );
    let applied = (|| {
        let mut plain = Hashing::new(decompress(&mut compressed)?, most);
        builder.layer(BufReader::with_capacity(BUFFER, &mut plain))?;
        plain.finish()
    })();
    // What was tampered with fails in many ways, and only one says why.
    let whole = compressed.finish();
    if !cancel.is_cancelled()
        && let (Some(expected), Ok((size, found))) = (layer.digest, whole.as_ref())
        && (*found != expected || *size != layer.size)
    {
        return Err(wrong().because(if *size == layer.size {
            format!("its content has the digest {found}")
        } else {
            format!("it has {size} bytes, not {}", layer.size)
        }));
    }
    let (bytes, diff_id) = applied.map_err(|error| {
        let too_much = error.get_ref().is_some_and(|inner| inner.is::<TooMuch>());
        match failed(error) {
            error if too_much => error.hinting(LIMITS_HINT),
            error => error,
        }
    })?;
    whole.map_err(failed)?;
    if diff_id != layer.diff_id {
        return Err(wrong().because(format!(
            "uncompressed it has the digest {diff_id}, and the image's configuration says {}",
            layer.diff_id
        )));
    }
    Ok(bytes)
}

/// The uncompressed bytes of a stream that is gzip, xz, zstd or plain, as its first bytes tell.
///
/// # Errors
///
/// Those of reading.
pub fn uncompressed<'r>(source: impl Read + 'r) -> io::Result<Box<dyn Read + 'r>> {
    let mut source = BufReader::with_capacity(BUFFER, source);
    // One read of a file gives as much as is looked at.
    if source.fill_buf()?.starts_with(&XZ_MAGIC) {
        return Ok(Box::new(liblzma::bufread::XzDecoder::new_multi_decoder(
            source,
        )));
    }
    decompress(source)
}

/// The .xz File Format, section 2.1.1.1.
const XZ_MAGIC: [u8; 6] = [0xfd, b'7', b'z', b'X', b'Z', 0];

/// The uncompressed bytes of a stream that is gzip, zstd or plain.
pub(super) fn decompress<'r>(source: impl Read + 'r) -> io::Result<Box<dyn Read + 'r>> {
    let mut source = BufReader::with_capacity(BUFFER, source);
    let mut magic = [0; 4];
    let mut known = 0;
    // A pipe may give its first bytes one by one.
    while known < magic.len() {
        match source.read(&mut magic[known..]) {
            Ok(0) => break,
            Ok(n) => known += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let kind = Compression::of(&magic[..known]);
    let source = Cursor::new(magic).take(known as u64).chain(source);
    Ok(match kind {
        Compression::None => Box::new(source),
        Compression::Gzip => Box::new(MultiGzDecoder::new(source)),
        Compression::Zstd => Box::new(Zstd::new(source)),
    })
}

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// What the first bytes tell: RFC 1952, section 2.3.1; RFC 8878, section 3.1.
    pub(super) fn of(magic: &[u8]) -> Self {
        match magic {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd] => Self::Zstd,
            // A frame that is to be skipped may come first.
            [low, 0x2a, 0x4d, 0x18] if low & 0xf0 == 0x50 => Self::Zstd,
            _ => Self::None,
        }
    }
}

/// One or more zstd frames; the crate reads one.
struct Zstd<R: BufRead> {
    /// Between frames.
    source: Option<R>,
    frame: Option<Box<StreamingDecoder<Frame<R>, FrameDecoder>>>,
}

/// A frame with the magic number that was read ahead.
type Frame<R> = io::Chain<Cursor<[u8; 4]>, R>;

impl<R: BufRead> Zstd<R> {
    fn new(source: R) -> Self {
        Self {
            source: Some(source),
            frame: None,
        }
    }

    /// Begins the next frame, past those that are to be skipped. Says whether there is one.
    fn next_frame(&mut self) -> io::Result<bool> {
        let mut source = self.source.take().expect("between frames");
        loop {
            if source.fill_buf()?.is_empty() {
                self.source = Some(source);
                return Ok(false);
            }
            let mut magic = [0; 4];
            source.read_exact(&mut magic)?;
            if magic[0] & 0xf0 == 0x50 && magic[1..] == [0x2a, 0x4d, 0x18] {
                let mut length = [0; 4];
                source.read_exact(&mut length)?;
                let length = u64::from(u32::from_le_bytes(length));
                if io::copy(&mut source.by_ref().take(length), &mut io::sink())? < length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                continue;
            }
            let frame = StreamingDecoder::new(Cursor::new(magic).chain(source))
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            self.frame = Some(Box::new(frame));
            return Ok(true);
        }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(frame) = &mut self.frame {
                let n = frame.read(buffer).map_err(|error| {
                    // The crate's errors say `Other`.
                    match error.kind() {
                        io::ErrorKind::Other => io::Error::new(io::ErrorKind::InvalidData, error),
                        _ => error,
                    }
                })?;
                if n > 0 {
                    return Ok(n);
                }
                let frame = self.frame.take().expect("there is one");
                self.source = Some(frame.into_inner().into_inner().1);
            } else if !self.next_frame()? {
                return Ok(0);
            }
        }
    }
}

/// Says how much was read.
struct Counted<'p, R> {
    inner: R,
    progress: &'p mut dyn FnMut(u64),
    bytes: u64,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.bytes += n as u64;
        (self.progress)(self.bytes);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn all(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut read = Vec::new();
        decompress(bytes)?.read_to_end(&mut read)?;
        Ok(read)
    }

    #[test]
    fn streams_are_uncompressed_by_what_they_begin_with() {
        let text = b"some text, some text, some text".repeat(5000);
        for (name, bytes) in [
            ("plain", text.clone()),
            ("gzip", gzip(&text)),
            ("zstd", zstd(&text)),
        ] {
            assert_eq!(all(&bytes).unwrap(), text, "{name}");
            if name != "plain" {
                assert!(all(&bytes[..bytes.len() - 9]).is_err(), "{name}, cut");
            }
        }
        for short in [&b""[..], b"a", b"abc"] {
            assert_eq!(all(short).unwrap(), short);
        }
    }

    #[test]
    fn files_may_be_xz_as_well() {
        let text = b"some text".repeat(5000);
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 0);
        xz.write_all(&text).unwrap();
        for bytes in [xz.finish().unwrap(), gzip(&text), text.clone()] {
            let mut read = Vec::new();
            uncompressed(bytes.as_slice())
                .unwrap()
                .read_to_end(&mut read)
                .unwrap();
            assert_eq!(read, text);
        }
    }

    #[test]
    fn streams_of_several_parts_are_read_to_their_end() {
        let (one, two) = (b"one ".repeat(1000), b"two ".repeat(1000));
        let both = [one.clone(), two.clone()].concat();
        assert_eq!(all(&[gzip(&one), gzip(&two)].concat()).unwrap(), both);
        let skipped = [&[0x53, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"xyz"].concat();
        let parts = [&skipped[..], &zstd(&one), &skipped, &zstd(&two), &skipped].concat();
        assert_eq!(all(&parts).unwrap(), both);
        assert!(all(&parts[..parts.len() - 1]).is_err());
        assert!(all(&[&zstd(&one)[..], b"junk"].concat()).is_err());
    }
}
