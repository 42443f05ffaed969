//! `cargo xtask bench`: the figures SPECIFICATION.md promises, measured and written down.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::run;

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The file is benchmarks/NAME.json; name the machine
    #[arg(long)]
    name: String,
    /// Lives of a sandbox
    #[arg(short = 'n', long, default_value_t = 10)]
    lives: u32,
    /// Starts of the program for each start-up figure
    #[arg(long, default_value_t = 200)]
    spawns: usize,
}

/// Figures of a lifecycle as SPECIFICATION.md orders them: the column, and the name in JSON.
const COLUMNS: [(&str, &str); 13] = [
    ("create", "host_create_ms"),
    ("start", "vmm_start_ms"),
    ("ready", "total_fresh_ready_ms"),
    ("first", "first_command_ms"),
    ("answer", "first_answer_ms"),
    ("next", "next_command_ms"),
    ("python", "python_ms"),
    ("stop", "stop_ms"),
    ("delete", "delete_ms"),
    ("kill", "kill_ms"),
    ("run", "run_ms"),
    ("total", "total_ms"),
    ("memory, MiB", "private_memory_mib"),
];

/// The ways to a sandbox that are measured.
const WAYS: [&str; 3] = ["cold", "template", "pool"];

pub(crate) fn run(args: &Args) -> Result<()> {
    run::check_name(&args.name)?;
    // Before the build: what is committed while it runs is not measured.
    let commit = run::commit();
    run::succeed(run::cargo().args(["build", "--release", "--locked"]).args([
        "-p",
        "smolvm-cli",
        "-p",
        "smolvm-keeper",
        "-p",
        "smolvm-agent",
    ]))?;
    let smolvm = run::program("release", "smolvm");
    run::succeed(
        Command::new(&smolvm)
            .arg("--data-dir")
            .arg(run::data_dir())
            .arg("setup"),
    )?;
    // So that one is built, which is a figure too.
    run::succeed(
        Command::new(&smolvm)
            .arg("--data-dir")
            .arg(run::data_dir())
            .args(["template", "rm", "--all"]),
    )?;

    let lifecycle = run::output(
        Command::new(&smolvm)
            .arg("--data-dir")
            .arg(run::data_dir())
            .args([
                "--json",
                "bench",
                "lifecycle",
                "-n",
                &args.lives.to_string(),
                "--plot",
                &format!("benchmarks/{}.svg", args.name),
            ])
            .stderr(Stdio::inherit()),
    )?;
    let lifecycle: Value = serde_json::from_str(&lifecycle).context("reading the benchmark")?;
    let mut lifecycle = lifecycle
        .get("data")
        .context("the benchmark gave no data")?
        .clone();
    let environment = lifecycle["environment"].take();

    let empty = tempfile::tempdir().context("making an empty data directory")?;
    let version = starts(&smolvm, empty.path(), &["--version"], args.spawns)?;
    let list = starts(&smolvm, empty.path(), &["ls"], args.spawns)?;

    row(&lifecycle, &environment, &version, &list);
    let data = json!({
        "environment": environment,
        "rustc": run::output(Command::new("rustc").arg("--version")).ok(),
        "commit": commit,
        "load_average": run::load_average(),
        "start_up": { "version": version, "ls_empty": list },
        "lifecycle": lifecycle,
    });
    run::record(&args.name, &data)
}

/// Starts the program often, from a parent that does nothing else, and gives milliseconds from
/// before the start to after the end.
fn starts(smolvm: &Path, data: &Path, args: &[&str], count: usize) -> Result<Value> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        let status = Command::new(smolvm)
            .args(args)
            .env("SMOLVM_DATA_DIR", data)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .context("starting smolvm")?;
        times.push(begin.elapsed().as_secs_f64() * 1e3);
        if !status.success() {
            bail!("smolvm {} ended with {status}", args.join(" "));
        }
    }
    times.sort_by(f64::total_cmp);
    // Nearest rank: always a value that was measured.
    let percentile = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
    Ok(json!({
        "p50": percentile(50), "p90": percentile(90), "p99": percentile(99),
        "min": times[0], "count": times.len(),
    }))
}

/// Prints what goes into the table of SPECIFICATION.md.
fn row(lifecycle: &Value, environment: &Value, version: &Value, list: &Value) {
    let text = |name: &str| environment[name].as_str().unwrap_or("?").to_owned();
    run::say(&format!(
        "\n{}, {} cores, {}, {}",
        text("cpu"),
        environment["cores"],
        text("accel"),
        text("date")
    ));
    let number = |value: &Value| value.as_f64().map_or("?".to_owned(), |v| format!("{v:.1}"));
    run::say("\n| ms | p50 | p90 | p99 | n |\n|---|---|---|---|---|");
    let line = |name: &str, stats: &Value| {
        run::say(&format!(
            "| {name} | {} | {} | {} | {} |",
            number(&stats["p50"]),
            number(&stats["p90"]),
            number(&stats["p99"]),
            stats["count"]
        ));
    };
    for way in WAYS {
        for (column, name) in COLUMNS {
            let stats = &lifecycle["ways"][way][name]["stats"];
            line(&format!("{way}: {column}"), stats);
        }
    }
    run::say(&format!(
        "| template build | {} | | | 1 |",
        number(&lifecycle["template_build_ms"])
    ));
    run::say(&format!(
        "| lives in a second | {} | | | |",
        number(&lifecycle["lives_per_second"])
    ));
    line("`smolvm --version`", version);
    line("`smolvm ls`, empty store", list);
}
