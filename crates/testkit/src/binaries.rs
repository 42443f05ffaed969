//! Where the programs under test are.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

/// The programs under test, all in one directory as after an installation.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// That directory.
    pub dir: PathBuf,
}

/// Their names.
const NAMES: [&str; 3] = ["smolvm", "smolvm-keeper", "smolvm-agent"];

impl Binaries {
    /// Finds them where cargo puts them: one directory above the test's own program.
    ///
    /// # Errors
    ///
    /// If one is absent, with the command that builds it.
    pub fn find() -> Result<Self> {
        let dir = match std::env::var_os("SMOLVM_TEST_BINARIES") {
            Some(dir) => PathBuf::from(dir),
            None => std::env::current_exe()
                .context("finding this test's own program")?
                .ancestors()
                .nth(2)
                .context("the test's program is not in a target directory")?
                .to_owned(),
        };
        for name in NAMES {
            if !dir.join(name).is_file() {
                bail!(
                    "{} is not there; build it with `cargo build --workspace --bins`",
                    dir.join(name).display()
                );
            }
        }
        Ok(Self { dir })
    }

    /// The command line.
    #[must_use]
    pub fn smolvm(&self) -> PathBuf {
        self.dir.join("smolvm")
    }

    /// Copies them to `dir`, readable and executable for everybody.
    ///
    /// # Errors
    ///
    /// If that fails.
    pub fn copy_to(&self, dir: PathBuf) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        std::fs::create_dir_all(&dir)?;
        for name in NAMES {
            std::fs::copy(self.dir.join(name), dir.join(name))
                .with_context(|| format!("copying {name}"))?;
            std::fs::set_permissions(dir.join(name), PermissionsExt::from_mode(0o755))?;
        }
        Ok(Self { dir })
    }
}
