//! OCI images: their descriptions, the archives and registries they come in, and turning one into a
//! root file system.
//!
//! ```text
//! archive    an `oci-layout` directory or archive, or what `docker save` writes: finds the images
//! unpack     layers, whatever they are compressed with, to one EROFS image; checks every digest
//! registry   pulling: finds an image, and brings its layers to files
//! reference  names of images, as Docker completes them
//! save       images out again, as an archive
//! spec       the descriptions themselves, and what of them is kept
//! ```
//!
//! All of it is a stranger's input. Names in an archive are keys to look parts up by, never paths on
//! this host; sizes are bounded before memory or disk is taken for them; and what is not what its
//! digest says is refused. Nothing is ever unpacked to the host's file system.

mod archive;
mod digest;
mod reference;
mod registry;
mod save;
mod spec;
mod unpack;

pub use archive::{Archive, ArchivedImage};
pub use digest::{Digest, DigestError};
pub use reference::{DEFAULT_REGISTRY, Reference, ReferenceError};
pub use registry::{ProxySettings, RegistrySettings, Remote, RemoteLayer};
pub use save::{SavedImage, save_images};
pub use spec::{ImageConfig, Platform, WARMUP_LABEL};
pub use unpack::{Layer, OciRequest, uncompressed, unpack_image};

#[cfg(test)]
mod tests;
