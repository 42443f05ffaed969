//! The files of a snapshot: made anew, and gone again if what they were made for fails.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::{Memory, VmError, VmErrorKind, VmPlan};

/// A file that was just made. Unless kept it is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct NewFile(Option<PathBuf>);

impl NewFile {
    /// Makes a file that only its owner may read and write. What is there already stays.
    pub(crate) fn create(path: &Path) -> Result<(File, NewFile), VmError> {
        let mut options = File::options();
        // Not for reading: QEMU takes a descriptor only for the very access that it was opened for.
        options.write(true).create_new(true).mode(0o600);
        let file = options
            .open(path)
            .map_err(|error| host("make", path, error))?;
        Ok((file, NewFile(Some(path.to_owned()))))
    }

    /// Lets it be.
    pub(crate) fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        let Some(path) = &self.0 else { return };
        if let Err(error) = std::fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "could not remove a file");
        }
    }
}

/// Makes the file that will hold the guest's memory.
pub(crate) fn new_memory(plan: &VmPlan) -> Result<Option<NewFile>, VmError> {
    let Memory::File(path) = &plan.memory else {
        return Ok(None);
    };
    new_memory_at(path, plan).map(|(_, new)| Some(new))
}

/// Makes a file for the memory of a machine: as long as it, with nothing in it, so that it takes
/// space only for what is written.
pub(crate) fn new_memory_at(path: &Path, plan: &VmPlan) -> Result<(File, NewFile), VmError> {
    let (file, new) = NewFile::create(path)?;
    file.set_len(memory_bytes(plan))
        .map_err(|error| host("size", path, error))?;
    Ok((file, new))
}

/// Opens what [`crate::Vm::snapshot`] wrote.
pub(crate) fn open_state(path: &Path) -> Result<File, VmError> {
    File::open(path).map_err(|error| host("open", path, error))
}

/// Refuses to boot a kernel in what another machine has left in memory.
pub(crate) fn refuse_unstartable(plan: &VmPlan) -> Result<(), VmError> {
    match plan.memory {
        Memory::Anonymous | Memory::File(_) => Ok(()),
        Memory::CopyOf(_) => Err(unsupported(
            "start",
            plan,
            "a copy of another's memory can only be restored",
        )),
    }
}

/// Refuses to restore into a memory that does not belong to the state. Returns the file to copy.
pub(crate) fn refuse_unrestorable(plan: &VmPlan) -> Result<File, VmError> {
    let Memory::CopyOf(path) = &plan.memory else {
        let why = "its memory is not a copy of another's";
        return Err(unsupported("restore", plan, why));
    };
    // For writing, too, as VMMs do who then write nothing.
    let file = File::options().read(true).write(true).open(path);
    let file = file.map_err(|error| host("open", path, error))?;
    let meta = file.metadata();
    let found = meta.map_err(|error| host("open", path, error))?.len();
    let wanted = memory_bytes(plan);
    if found != wanted {
        let why = format!(
            "it has {wanted} bytes of memory, and {} has {found}",
            path.display()
        );
        return Err(unsupported("restore", plan, why));
    }
    Ok(file)
}

/// Refuses to make a snapshot without its memory.
pub(crate) fn refuse_unsavable(plan: &VmPlan, memory: Option<&Path>) -> Result<(), VmError> {
    match (&plan.memory, memory) {
        (Memory::File(_), None) | (_, Some(_)) => Ok(()),
        (Memory::Anonymous | Memory::CopyOf(_), None) => Err(unsupported(
            "take a snapshot of",
            plan,
            "its memory is not in a file of its own",
        )),
    }
}

pub(crate) fn memory_bytes(plan: &VmPlan) -> u64 {
    u64::from(plan.memory_mib) << 20
}

fn unsupported(verb: &str, plan: &VmPlan, why: impl Into<String>) -> VmError {
    let doing = format!("{verb} the machine {}", plan.name);
    VmError::new(VmErrorKind::Unsupported, doing, why.into())
}

fn host(verb: &str, path: &Path, error: std::io::Error) -> VmError {
    let doing = format!("{verb} the file {}", path.display());
    VmError::new(VmErrorKind::Host, doing, error)
}
