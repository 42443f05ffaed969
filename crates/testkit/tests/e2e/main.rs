//! End-to-end tests: the real programs, real machines, one module for each feature.

mod concurrency;
mod deaths;
mod life;
mod run;
mod signals;
mod stream;
