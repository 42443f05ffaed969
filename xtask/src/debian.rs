//! Debian systems in directories and archives, by mmdebstrap(1).

use std::fs;
use std::process::Command;

use anyhow::Result;

use crate::run;

/// apt's settings of a network, as opposed to habits of a machine.
const APT_SETTINGS: [&str; 5] = [
    "Acquire::http",
    "Acquire::https",
    "Acquire::Retries",
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
];

/// The release of every Debian that is made here.
pub(crate) const RELEASE: &str = "bookworm";

/// An mmdebstrap that reaches mirrors as this host does. The release, the target and the
/// [sources](sources) come after what the caller adds.
pub(crate) fn mmdebstrap() -> Result<Command> {
    let mut command = Command::new("mmdebstrap");
    let settings = run::output(Command::new("apt-config").arg("dump"))?;
    for line in settings.lines() {
        if APT_SETTINGS.iter().any(|name| line.starts_with(name)) && !line.ends_with("\"\";") {
            command.arg(format!("--aptopt={line}"));
        }
    }
    command.env("DEBIAN_FRONTEND", "noninteractive");
    Ok(command)
}

/// The host's own list of sources, if it is one of the same release; otherwise mmdebstrap has its own.
pub(crate) fn sources() -> Option<&'static str> {
    let lists = [
        "/etc/apt/sources.list.d/debian.sources",
        "/etc/apt/sources.list",
    ];
    let same = |path: &&str| fs::read_to_string(path).is_ok_and(|text| text.contains(RELEASE));
    lists.into_iter().find(same)
}
