//! Root file systems: read-only EROFS images, from a tar stream or built from packages.

mod archive;
pub mod build;
pub mod erofs;

pub use build::{
    BuildRequest, Image, ImageManifest, ImportRequest, Package, build_default_image, import_tar,
};
pub use erofs::Limits;
