//! What a face tells the engine about the world, read once and passed as values.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use smolvm_host::oci::RegistrySettings;

use crate::engines::EngineChoice;
use crate::network::NetworkConfig;
use crate::settings::Settings;

/// Where things are and how to behave. No field has a meaning that depends on another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Directory of all state: database, images, kernels, sandboxes. Made on first use.
    pub data_dir: PathBuf,
    /// The `smolvm-keeper` program.
    pub keeper: PathBuf,
    /// The `smolvm-agent` program, packed into every guest.
    pub agent: PathBuf,
    /// Directories searched for host programs, as in `PATH`.
    pub program_dirs: Vec<PathBuf>,
    /// How guest instructions are to run.
    pub accel: AccelChoice,
    /// Which engine is to run machines. Overrules the settings, unless it is the default.
    pub engine: EngineChoice,
    /// Whether a first start restores a machine that was booted ahead of it.
    pub templates: bool,
    /// How the networks of sandboxes are made.
    pub network: NetworkConfig,
    /// How to reach registries of images. Not handed on to processes that only start sandboxes.
    #[serde(skip)]
    pub registries: RegistrySettings,
    /// Most time a guest may take from start to ready.
    pub boot_timeout: Duration,
    /// What the owner of the data directory has set.
    pub settings: Settings,
}

/// How guest instructions are to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum AccelChoice {
    /// Hardware virtualization if a probe shows that it works, else emulation.
    #[default]
    Auto,
    /// Hardware virtualization, or an error that says why not.
    Kvm,
    /// Emulation.
    Emulation,
}

/// Default of [`Config::boot_timeout`]: ten times a boot under emulation on a busy two-core machine.
pub const BOOT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
