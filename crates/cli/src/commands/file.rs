//! `smolvm file`: files of a running sandbox.

use std::path::{Path, PathBuf};

use clap_complete::engine::ArgValueCandidates;
use serde_json::json;
use smolvm_engine::{Copied, CopyOptions, FileInfo, FileKind};

use super::{Context, Outcome, block_on};
use crate::complete;
use crate::output::Output;
use crate::progress::Meter;
use crate::report::CliError;
use crate::signals::Signals;
use crate::units;

/// Arguments of `file upload`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm file upload box data.csv /tmp/data.csv")]
pub(crate) struct UploadArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// File or directory here
    local: PathBuf,
    /// Path in the sandbox
    guest: String,
    /// Fail if the directory it goes into is not there
    #[arg(long)]
    no_create_dirs: bool,
}

/// Arguments of `file download`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm file download box /tmp/result.json .")]
pub(crate) struct DownloadArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// File or directory in the sandbox
    guest: String,
    /// Path here
    local: PathBuf,
}

/// Arguments of `file ls`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  smolvm file ls -l box /etc")]
pub(crate) struct LsArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// Directory in the sandbox
    #[arg(default_value = "/")]
    path: String,
    /// Also mode, owner, size and time
    #[arg(short, long)]
    long: bool,
}

/// `smolvm file upload`.
pub(crate) fn upload(args: &UploadArgs, cx: &Context) -> Result<Outcome, CliError> {
    copy_in(
        cx,
        &args.name,
        &args.local,
        &args.guest,
        !args.no_create_dirs,
    )
}

/// `smolvm file download`.
pub(crate) fn download(args: &DownloadArgs, cx: &Context) -> Result<Outcome, CliError> {
    copy_out(cx, &args.name, &args.guest, &args.local)
}

/// Copies into a sandbox.
pub(super) fn copy_in(
    cx: &Context,
    name: &str,
    local: &Path,
    guest: &str,
    make_parents: bool,
) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let copied = block_on(async {
        let mut signals = Signals::install()?;
        let session = signals.or_interrupted(engine.connect(name)).await?;
        let mut meter = Meter::new(cx.out, cx.world.stderr_terminal);
        let mut progress = |done, total| meter.bytes("uploading", done, total);
        let options = CopyOptions { make_parents };
        let copied = signals
            .or_interrupted(session.upload(local, guest, &options, &mut progress))
            .await;
        meter.finish();
        copied
    })?;
    Ok(outcome(cx, name, &copied))
}

/// Copies out of a sandbox.
pub(super) fn copy_out(
    cx: &Context,
    name: &str,
    guest: &str,
    local: &Path,
) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let copied = block_on(async {
        let mut signals = Signals::install()?;
        let session = signals.or_interrupted(engine.connect(name)).await?;
        let mut meter = Meter::new(cx.out, cx.world.stderr_terminal);
        let mut progress = |done, total| meter.bytes("downloading", done, total);
        let options = CopyOptions {
            make_parents: false,
        };
        let copied = signals
            .or_interrupted(session.download(guest, local, &options, &mut progress))
            .await;
        meter.finish();
        copied
    })?;
    Ok(outcome(cx, name, &copied))
}

/// Copies standard input into a file of a sandbox.
pub(super) fn stream_in(cx: &Context, name: &str, guest: &str) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let copied = block_on(async {
        let mut signals = Signals::install()?;
        let session = signals.or_interrupted(engine.connect(name)).await?;
        let mut meter = Meter::new(cx.out, cx.world.stderr_terminal);
        let mut progress = |done, total| meter.bytes("uploading", done, total);
        let options = CopyOptions {
            make_parents: false,
        };
        let upload = session.upload_stream(tokio::io::stdin(), guest, &options, &mut progress);
        let copied = signals.or_interrupted(upload).await;
        meter.finish();
        copied
    })?;
    Ok(outcome(cx, name, &copied))
}

/// Copies a file of a sandbox to standard output.
pub(super) fn stream_out(cx: &Context, name: &str, guest: &str) -> Result<Outcome, CliError> {
    if cx.out.json {
        return Err(CliError::usage(
            "with --json, standard output is one JSON object and not a file",
            "leave --json out, or copy to a file",
        ));
    }
    let engine = cx.engine(None)?;
    let copied = block_on(async {
        let mut signals = Signals::install()?;
        let session = signals.or_interrupted(engine.connect(name)).await?;
        // A bar would be drawn into what is shown on the same terminal.
        let bar = cx.world.stderr_terminal && !cx.world.stdout_terminal;
        let out = Output {
            quiet: cx.out.quiet || cx.world.stdout_terminal,
            ..cx.out
        };
        let mut meter = Meter::new(out, bar);
        let mut progress = |done, total| meter.bytes("downloading", done, total);
        let download = session.download_stream(guest, std::io::stdout(), &mut progress);
        let copied = signals.or_interrupted(download).await;
        meter.finish();
        copied.map_err(|error| match error {
            CliError::Engine(error) if is_broken_pipe(&error) => CliError::BrokenPipe,
            error => error,
        })
    })?;
    Ok(json!({ "vm": { "name": name }, "files": copied.files, "bytes": copied.bytes }).into())
}

/// Whether it came about because nobody reads standard output any more.
fn is_broken_pipe(error: &smolvm_engine::Error) -> bool {
    std::error::Error::source(error)
        .and_then(|source| source.downcast_ref::<std::io::Error>())
        .is_some_and(|source| source.kind() == std::io::ErrorKind::BrokenPipe)
}

fn outcome(cx: &Context, name: &str, copied: &Copied) -> Outcome {
    let files = if copied.files == 1 { "file" } else { "files" };
    cx.out.status(&format!(
        "copied {} {files}, {}, to {}",
        copied.files,
        units::show_bytes(copied.bytes),
        copied.target
    ));
    json!({
        "vm": { "name": name },
        "files": copied.files,
        "bytes": copied.bytes,
        "target": copied.target,
    })
    .into()
}

/// `smolvm file ls`.
pub(crate) fn ls(args: &LsArgs, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let mut files = block_on(async {
        let mut signals = Signals::install()?;
        let session = signals.or_interrupted(engine.connect(&args.name)).await?;
        signals
            .or_interrupted(session.list_dir(&args.path, false))
            .await
    })?;
    files.sort_by(|a, b| a.name.cmp(&b.name));
    if args.long {
        cx.out.table(
            &["MODE", "OWNER", "SIZE", "MODIFIED", "NAME"],
            files.iter().map(long).collect(),
        )?;
    } else {
        for file in &files {
            // A name may hold a line feed or worse.
            cx.out.line(&file.name.escape_debug().to_string())?;
        }
    }
    let files: Vec<_> = files
        .iter()
        .map(|file| {
            json!({
                "name": file.name,
                "kind": kind(file.kind),
                "mode": format!("{:04o}", file.mode & 0o7777),
                "uid": file.uid,
                "gid": file.gid,
                "size": file.size,
                "modified": file.modified,
                "target": file.target,
            })
        })
        .collect();
    Ok(json!({ "vm": { "name": args.name }, "path": args.path, "files": files }).into())
}

fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::File => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Other => "other",
    }
}

fn long(file: &FileInfo) -> Vec<String> {
    vec![
        mode(file.kind, file.mode),
        format!("{}:{}", file.uid, file.gid),
        file.size.to_string(),
        format!("{:.0}", file.modified),
        match &file.target {
            Some(target) => format!("{} -> {target}", file.name),
            None => file.name.clone(),
        },
    ]
}

/// A mode as ls(1) writes it.
fn mode(kind: FileKind, mode: u32) -> String {
    let mut text = String::from(match kind {
        FileKind::File => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::Other => '?',
    });
    for (shift, special, small, big) in [
        (6, 0o4000, 's', 'S'),
        (3, 0o2000, 's', 'S'),
        (0, 0o1000, 't', 'T'),
    ] {
        let bits = mode >> shift;
        text.push(if bits & 4 == 0 { '-' } else { 'r' });
        text.push(if bits & 2 == 0 { '-' } else { 'w' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => small,
            (true, false) => big,
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_read_like_ls() {
        assert_eq!(mode(FileKind::File, 0o100_644), "-rw-r--r--");
        assert_eq!(mode(FileKind::Directory, 0o41_777), "drwxrwxrwt");
        assert_eq!(mode(FileKind::File, 0o104_755), "-rwsr-xr-x");
        assert_eq!(mode(FileKind::Symlink, 0o120_000), "l---------");
    }
}
