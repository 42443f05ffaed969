//! Why a keeper gives up. Written to its log; what a client should know travels as an answer.

/// Why a keeper gives up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeeperError {
    /// The state or the launch file.
    #[error(transparent)]
    Engine(#[from] smolvm_engine::Error),
    /// The machine.
    #[error(transparent)]
    Vm(#[from] smolvm_vmm::VmError),
    /// The host.
    #[error("could not {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A guest that did not come up.
    #[error("{source}{}", said(console))]
    Guest {
        /// What was being done, and why it failed.
        source: Box<KeeperError>,
        /// The last lines of the console.
        console: Vec<String>,
    },
    /// No engine of that name.
    #[error("there is no engine named `{0}`")]
    UnknownEngine(String),
    /// Another process repaired the sandbox's record while the keeper was coming up.
    #[error("the sandbox was declared dead while it was starting")]
    Declared,
}

fn said(console: &[String]) -> String {
    if console.is_empty() {
        String::new()
    } else {
        format!("; its console ends with: {}", console.join(" | "))
    }
}

impl KeeperError {
    /// It and its causes on one line.
    pub(crate) fn chain(&self) -> String {
        smolvm_engine::in_one_line(self)
    }

    pub(crate) fn io(doing: &'static str, source: std::io::Error) -> Self {
        Self::Io { doing, source }
    }
}
