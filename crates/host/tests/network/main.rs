//! The network of sandboxes, with real packets between namespaces of the tests' own. Needs root.

mod beside;
mod lab;
mod life;
mod names;
mod packets;
mod user;
