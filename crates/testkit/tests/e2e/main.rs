//! End-to-end tests: the real programs, real machines, one module for each feature.

mod accel;
mod concurrency;
mod copies;
mod counts;
mod deaths;
mod disks;
mod files;
mod guest;
mod images;
mod life;
mod network;
mod oci;
mod pools;
mod ports;
mod run;
mod setup;
mod signals;
mod small;
mod ssh;
mod stream;
mod templates;
mod trouble;
mod ttl;
mod unprivileged;
mod user_network;
mod volumes;
