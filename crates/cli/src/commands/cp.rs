//! `smolvm cp`: files and directories between here and a sandbox, or its standard input and output.

use std::path::Path;

use clap_complete::engine::{
    ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter as _,
};
use smolvm_engine::SandboxName;

use super::{Context, Outcome, file};
use crate::complete;
use crate::report::CliError;

/// Arguments of `cp`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm cp data.csv box:/tmp/
  smolvm cp box:/var/log/messages .
  tar -c src | smolvm cp - box:/srv/src.tar
  smolvm cp box:/srv/out.json - | jq .

`-` is standard input or output, and one file on the other side. A file appears whole under its name
or not at all, also if the copy is interrupted; a tree that goes in, file by file.
A local path with a colon in it is written ./like:this.")]
pub(crate) struct Args {
    /// What to copy: PATH, NAME:PATH or -
    #[arg(value_name = "FROM", add = ArgValueCompleter::new(sides))]
    from: String,
    /// Where to: NAME:PATH, PATH or -
    #[arg(value_name = "TO", add = ArgValueCompleter::new(sides))]
    to: String,
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Side<'a> {
    Here(&'a Path),
    Stream,
    Guest { name: &'a str, path: String },
}

/// Understands one side. Only what can be a sandbox's name before the first colon is one.
fn side(text: &str) -> Side<'_> {
    match text.split_once(':') {
        Some((name, path)) if name.parse::<SandboxName>().is_ok() => {
            // As with Docker, a relative path begins at the root.
            let path = if path.starts_with('/') {
                path.to_owned()
            } else {
                format!("/{path}")
            };
            Side::Guest { name, path }
        }
        _ if text == "-" => Side::Stream,
        _ => Side::Here(Path::new(text)),
    }
}

/// Copies.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    match (side(&args.from), side(&args.to)) {
        (Side::Here(local), Side::Guest { name, path }) => {
            file::copy_in(cx, name, local, &path, false)
        }
        (Side::Guest { name, path }, Side::Here(local)) => file::copy_out(cx, name, &path, local),
        (Side::Stream, Side::Guest { name, path }) => file::stream_in(cx, name, &path),
        (Side::Guest { name, path }, Side::Stream) => file::stream_out(cx, name, &path),
        (Side::Here(_) | Side::Stream, Side::Here(_) | Side::Stream) => Err(CliError::usage(
            "neither side is in a sandbox",
            "write one of them as NAME:/path",
        )),
        (Side::Guest { .. }, Side::Guest { .. }) => Err(CliError::usage(
            "both sides are in a sandbox",
            "copy out of the one first, then into the other",
        )),
    }
}

/// Completes a side: sandboxes with a colon, and local paths.
fn sides(typed: &std::ffi::OsStr) -> Vec<CompletionCandidate> {
    let mut candidates: Vec<CompletionCandidate> = complete::sandboxes()
        .into_iter()
        .map(|candidate| {
            let mut name = candidate.get_value().to_owned();
            name.push(":");
            CompletionCandidate::new(name)
        })
        .filter(|candidate| {
            candidate
                .get_value()
                .as_encoded_bytes()
                .starts_with(typed.as_encoded_bytes())
        })
        .collect();
    candidates.extend(PathCompleter::any().complete(typed));
    candidates
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_of_a_copy() {
        let guest = |name, path: &str| Side::Guest {
            name,
            path: path.to_owned(),
        };
        assert_eq!(side("box:/tmp"), guest("box", "/tmp"));
        assert_eq!(side("box:tmp/a:b"), guest("box", "/tmp/a:b"));
        assert_eq!(side("box:"), guest("box", "/"));
        assert_eq!(side("./box:/tmp"), Side::Here(Path::new("./box:/tmp")));
        assert_eq!(side("/a:b"), Side::Here(Path::new("/a:b")));
        assert_eq!(side("-"), Side::Stream);
        assert_eq!(side("./-"), Side::Here(Path::new("./-")));
        assert_eq!(side("box"), Side::Here(Path::new("box")));
        assert_eq!(side("C:x"), Side::Here(Path::new("C:x")));
    }
}
