//! `smolvm ssh` and `smolvm ssh-config`: OpenSSH's client, told where the sandbox is and who it is.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use clap_complete::engine::ArgValueCandidates;
use serde_json::{Value, json};
use smolvm_engine::SshAccess;

use super::{Context, Outcome};
use crate::complete;
use crate::report::CliError;

/// Arguments of `ssh`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm ssh box
  smolvm ssh box -- uname -a
  smolvm ssh box --ssh-arg=-L8080:localhost:80 --ssh-arg=-N
  smolvm ssh box -u nobody

Runs `ssh` with the sandbox's port, your key and the sandbox's own, and nothing of ~/.ssh. For scp,
sftp, rsync and editors see `smolvm ssh-config`. The exit code is that of ssh: the command's own, or
255 if there is no connection.")]
pub(crate) struct Args {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
    /// User in the guest [default: the sandbox's, or root]
    #[arg(short, long)]
    user: Option<String>,
    /// An argument for ssh itself; can be repeated
    #[arg(long = "ssh-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    ssh_args: Vec<OsString>,
    /// Print what `smolvm ssh-config` prints
    #[arg(long)]
    print_config: bool,
    /// The command; a login shell if there is none
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Arguments of `ssh-config`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  smolvm ssh-config box >> ~/.ssh/config
  smolvm ssh-config box > box.conf && rsync -a -e 'ssh -F box.conf' src/ box:src/

Prints a block for OpenSSH's configuration, after which `ssh box`, `scp`, `sftp`, `rsync` and editors
know the sandbox by its name. It holds until the sandbox is deleted.")]
pub(crate) struct ConfigArgs {
    /// The sandbox
    #[arg(add = ArgValueCandidates::new(complete::sandboxes))]
    name: String,
}

/// Becomes the client. Returns only if that fails.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    if args.print_config {
        return print(&args.name, cx);
    }
    if cx.out.json {
        return Err(CliError::usage(
            "ssh cannot be used with --json: what it writes is not data",
            format!("smolvm exec --json {} -- COMMAND", args.name),
        ));
    }
    let access = cx.engine(None)?.ssh(&args.name)?;
    // No file of anybody's: what is said here is all that holds.
    let mut client = Command::new("ssh");
    client.args(["-F", "none"]);
    for (name, value) in access.options() {
        let value = match (name, &args.user) {
            ("User", Some(user)) => user.clone(),
            _ => value,
        };
        client.arg("-o").arg(format!("{name}={value}"));
    }
    client.args(&args.ssh_args).arg("--").arg(&args.name);
    client.args(&args.command);
    let error = client.exec();
    if error.kind() == std::io::ErrorKind::NotFound {
        return Err(CliError::Missing {
            message: "OpenSSH's client `ssh` is not there".to_owned(),
            hint: "install it, for example with `apt-get install openssh-client`".to_owned(),
        });
    }
    Err(CliError::io("running ssh", error))
}

/// Prints the block.
pub(crate) fn config(args: &ConfigArgs, cx: &Context) -> Result<Outcome, CliError> {
    print(&args.name, cx)
}

fn print(name: &str, cx: &Context) -> Result<Outcome, CliError> {
    let access = cx.engine(None)?.ssh(name)?;
    cx.out.line(access.config(name).trim_end())?;
    Ok(json!({ "ssh": describe(name, &access) }).into())
}

fn describe(name: &str, access: &SshAccess) -> Value {
    json!({
        "host": name,
        "address": smolvm_engine::ssh::SSH_ADDRESS.to_string(),
        "port": access.port,
        "user": access.user,
        "identity_file": access.identity,
        "known_hosts_file": access.known_hosts,
        "host_key_alias": access.alias,
        "config": access.config(name),
    })
}
