//! `smolvm bench lifecycle`: what the whole life of a sandbox costs on this host.
//!
//! The numbers in the README come from here. The JSON names are those of the benchmark the product
//! has always shipped, so that files of all releases can be put side by side.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use smolvm_engine::{DEFAULT_IMAGE, Engine, ExecEvent, ExecSpec, SandboxSpec, Session};

use super::{Context, Outcome, block_on};
use crate::prepare;
use crate::report::CliError;
use crate::signals::Signals;
use crate::units;

/// Commands timed one after another in each sandbox; their median is one value.
const COMMANDS: usize = 20;

/// Arguments of `bench lifecycle`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  smolvm bench lifecycle -n 10 -o result.json

For each sandbox in turn, in milliseconds: create; start (until its keeper and VMM are launched);
ready (create until it takes commands); first (the first `true`); next (the median of 20 more);
python (the first `python3 -c 'print(6*7)'`); stop; delete; total (create until deleted).")]
pub(crate) struct Args {
    /// Sandboxes
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 5)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    iterations: u32,
    /// Image
    #[arg(long, default_value = DEFAULT_IMAGE)]
    image: String,
    /// Also write the JSON of --json to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What is measured: the column, and the name in JSON.
const METRICS: [(&str, &str); 9] = [
    ("create", "host_create_ms"),
    ("start", "vmm_start_ms"),
    ("ready", "total_fresh_ready_ms"),
    ("first", "first_command_ms"),
    ("next", "next_command_ms"),
    ("python", "python_ms"),
    ("stop", "stop_ms"),
    ("delete", "delete_ms"),
    ("total", "total_ms"),
];

/// One sandbox's values, in the order of [`METRICS`].
type Life = [Duration; METRICS.len()];

/// Measures.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let (began, clock) = (jiff::Timestamp::now(), Instant::now());
    let lives = block_on(async {
        let mut signals = Signals::install()?;
        prepare::image(cx, &engine, &mut signals, &args.image, None).await?;
        let mut lives = Vec::new();
        for turn in 1..=args.iterations {
            let mut spec = SandboxSpec::new(engine.unused_name()?);
            spec.image.clone_from(&args.image);
            let name = spec.name.to_string();
            match signals.or_interrupted(live(&engine, &spec)).await {
                Ok(life) => lives.push(life),
                Err(error) => {
                    // The failure is what matters; a failed clean-up shows in `ls`.
                    let _ = signals.or_interrupted(engine.delete(&name)).await;
                    return Err(error);
                }
            }
            cx.out.status(&format!(
                "{turn} of {}: {:.0} ms",
                args.iterations,
                units::millis(lives[lives.len() - 1][METRICS.len() - 1])
            ));
        }
        Ok(lives)
    })?;
    let stamp = environment(&engine);
    let series: Vec<Series> = (0..METRICS.len())
        .map(|metric| {
            Series::new(
                lives
                    .iter()
                    .map(|life| units::millis(life[metric]))
                    .collect(),
            )
        })
        .collect();
    show(cx, &series, &stamp)?;
    let data = data(args, &series, stamp, began, clock.elapsed());
    if let Some(path) = &args.output {
        write(path, &data)?;
    }
    Ok(data.into())
}

/// One sandbox from nothing to nothing.
async fn live(engine: &Engine, spec: &SandboxSpec) -> Result<Life, CliError> {
    let name = spec.name.as_str();
    let begin = Instant::now();
    engine.create(spec)?;
    let create = begin.elapsed();
    let (session, times) = engine.start(name).await?;
    let ready = begin.elapsed();
    let first = command(&session, &["true"]).await?;
    let mut next = Vec::with_capacity(COMMANDS);
    for _ in 0..COMMANDS {
        next.push(command(&session, &["true"]).await?);
    }
    next.sort();
    let python = command(&session, &["python3", "-c", "print(6*7)"]).await?;
    drop(session);
    let at = Instant::now();
    engine.stop(name, Duration::from_secs(10)).await?;
    let stop = at.elapsed();
    let at = Instant::now();
    engine.delete(name).await?;
    let delete = at.elapsed();
    let total = begin.elapsed();
    Ok([
        create,
        times.vmm,
        ready,
        first,
        next[COMMANDS / 2],
        python,
        stop,
        delete,
        total,
    ])
}

/// Runs a command to its end, output and all.
async fn command(session: &Session, argv: &[&str]) -> Result<Duration, CliError> {
    let spec = ExecSpec::new(argv.iter().map(Into::into).collect());
    let begin = Instant::now();
    let mut exec = session.exec(&spec).await?;
    loop {
        if let ExecEvent::Exited(status) = exec.next().await? {
            if status.code != Some(0) {
                return Err(CliError::Partly(format!(
                    "`{}` failed in the guest",
                    argv.join(" ")
                )));
            }
            return Ok(begin.elapsed());
        }
    }
}

/// The values of one metric.
struct Series {
    raw: Vec<f64>,
    sorted: Vec<f64>,
}

impl Series {
    fn new(raw: Vec<f64>) -> Self {
        let mut sorted = raw.clone();
        sorted.sort_by(f64::total_cmp);
        Self { raw, sorted }
    }

    /// The nearest-rank percentile: always a value that was measured.
    fn percentile(&self, percent: usize) -> f64 {
        let rank = (self.sorted.len() * percent).div_ceil(100).max(1);
        self.sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    fn mean(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "there are not 2^52 sandboxes")]
        let count = self.raw.len() as f64;
        self.raw.iter().sum::<f64>() / count
    }
}

fn show(cx: &Context, series: &[Series], stamp: &Map<String, Value>) -> Result<(), CliError> {
    let cell = |value: f64| format!("{value:.1}");
    let rows = METRICS.iter().zip(series).map(|((column, _), series)| {
        vec![
            (*column).to_owned(),
            cell(series.percentile(50)),
            cell(series.percentile(90)),
            cell(series.percentile(99)),
            cell(series.percentile(0)),
            cell(series.percentile(100)),
        ]
    });
    cx.out
        .table(&["MS", "P50", "P90", "P99", "MIN", "MAX"], rows.collect())?;
    cx.out.line("")?;
    let count = series.first().map_or(0, |series| series.raw.len());
    cx.out.line(&format!("n: {count}"))?;
    for (name, value) in stamp {
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        cx.out.line(&format!("{name}: {text}"))?;
    }
    Ok(())
}

fn data(
    args: &Args,
    series: &[Series],
    stamp: Map<String, Value>,
    began: jiff::Timestamp,
    took: Duration,
) -> Value {
    let mut results = Map::new();
    for ((_, name), series) in METRICS.iter().zip(series) {
        let stats = json!({
            "p50": series.percentile(50),
            "p90": series.percentile(90),
            "p95": series.percentile(95),
            "p99": series.percentile(99),
            "mean": series.mean(),
            "min": series.percentile(0),
            "max": series.percentile(100),
            "count": series.raw.len(),
        });
        results.insert(
            (*name).to_owned(),
            json!({ "stats": stats, "raw": series.raw }),
        );
    }
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "environment": stamp,
        "backend": "qemu",
        "image": args.image,
        "iterations": args.iterations,
        "started_at": began,
        "duration_s": took.as_secs_f64(),
        "results": results,
    })
}

fn write(path: &Path, data: &Value) -> Result<(), CliError> {
    let failed = |error| CliError::io(format!("writing {}", path.display()), error);
    let mut text = serde_json::to_vec_pretty(data).map_err(|error| failed(error.into()))?;
    text.push(b'\n');
    std::fs::write(path, text).map_err(failed)
}

/// What the figures were measured on.
fn environment(engine: &Engine) -> Map<String, Value> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map(|(_, value)| value.trim().to_owned())
    };
    let memory_kib = field(&read("/proc/meminfo"), "MemTotal")
        .and_then(|value| value.trim_end_matches(" kB").parse::<u64>().ok());
    let accel = engine.acceleration().ok().map(|found| {
        if found.kvm {
            "kvm".to_owned()
        } else {
            format!("emulation ({})", prepare::in_short(&found.reason))
        }
    });
    let mut stamp = Map::new();
    let mut add = |name: &str, value: Value| stamp.insert(name.to_owned(), value);
    add("smolvm", json!(env!("CARGO_PKG_VERSION")));
    add("date", json!(format!("{:.0}", jiff::Timestamp::now())));
    add("cpu", json!(field(&read("/proc/cpuinfo"), "model name")));
    add(
        "cores",
        json!(
            std::thread::available_parallelism()
                .ok()
                .map(std::num::NonZero::get)
        ),
    );
    add(
        "memory",
        json!(memory_kib.map(|kib| units::show_bytes(kib * 1024))),
    );
    add(
        "kernel",
        json!(rustix::system::uname().release().to_string_lossy()),
    );
    add("accel", json!(accel));
    add("qemu", json!(qemu_version(&engine.config().program_dirs)));
    stamp
}

/// The first line QEMU says of itself; a benchmark may spawn a process for it.
fn qemu_version(dirs: &[PathBuf]) -> Option<String> {
    let name = format!("qemu-system-{}", std::env::consts::ARCH);
    let program = dirs
        .iter()
        .map(|dir| dir.join(&name))
        .find(|path| path.is_file())?;
    let output = std::process::Command::new(program)
        .arg("--version")
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let series = Series::new((1..=10).rev().map(f64::from).collect());
        let percentiles = [0, 50, 90, 99, 100].map(|percent| series.percentile(percent));
        assert_eq!(
            percentiles.map(|value| value.to_string()),
            ["1", "5", "9", "10", "10"]
        );
        assert_eq!(Series::new(vec![7.0]).percentile(50).to_string(), "7");
        assert_eq!(series.mean().to_string(), "5.5");
    }
}
