//! `smolvm bench files`: how fast files go in and out of a sandbox.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Map, Value, json};
use smolvm_engine::{CopyOptions, DEFAULT_IMAGE, Engine, SandboxSpec, Session};

use super::{Series, environment, write};
use crate::commands::machine::kernel_choice;
use crate::commands::{Context, Outcome, block_on};
use crate::prepare;
use crate::report::CliError;
use crate::signals::Signals;

/// MiB of the one file that is copied.
const FILE_MIB: u32 = 64;
/// Files of the tree that is copied, and bytes of each.
const TREE_FILES: u32 = 1000;
const TREE_FILE_BYTES: usize = 4096;

/// Arguments of `bench files`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  smolvm bench files -n 5 -o files.json

In one sandbox, each in turn: a file of 64 MiB in and out by `cp`, in MiB a second, and a tree of
1000 files of 4 KiB in and out, in files a second.")]
pub(crate) struct Args {
    /// Copies of each kind
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 5)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000))]
    iterations: u32,
    /// Image
    #[arg(long, default_value = DEFAULT_IMAGE)]
    image: String,
    /// Kernel: small, docker, stock, or a file [default: small if it was built, else stock]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<PathBuf>,
    /// Also write the JSON of --json to this file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What is measured: its name for people, its name in JSON, and its unit.
const METRICS: [(&str, &str, &str); 4] = [
    ("file in", "file_in", "MiB/s"),
    ("file out", "file_out", "MiB/s"),
    ("tree in", "tree_in", "files/s"),
    ("tree out", "tree_out", "files/s"),
];

/// Measures.
pub(crate) fn run(args: &Args, cx: &Context) -> Result<Outcome, CliError> {
    let engine = cx.engine(None)?;
    let kernel = kernel_choice(args.kernel.as_deref())?;
    // Beside the sandboxes, so on the disk on which they are.
    let scratch = engine
        .config()
        .data_dir
        .join(format!("bench-{}", std::process::id()));
    let measured = block_on(async {
        let mut signals = Signals::install()?;
        prepare::image(cx, &engine, &mut signals, &args.image, &kernel, false).await?;
        let mut spec = SandboxSpec::new(engine.unused_name()?);
        spec.image.clone_from(&args.image);
        spec.kernel.clone_from(&kernel);
        let measured = signals
            .or_interrupted(measure(args, cx, &engine, &spec, &scratch))
            .await;
        // What it failed with matters more than whether this works.
        let _ = engine.delete(spec.name.as_str()).await;
        let _ = std::fs::remove_dir_all(&scratch);
        measured
    })?;
    let mut stamp = environment(&engine);
    stamp.insert(
        "guest_kernel".to_owned(),
        json!(engine.kernel_key(&kernel)?),
    );
    let series: Vec<Series> = measured.into_iter().map(Series::new).collect();
    show(cx, args, &series, &stamp)?;
    let data = data(args, &series, stamp);
    if let Some(path) = &args.output {
        write(path, &data)?;
    }
    Ok(data.into())
}

/// The values of each metric.
async fn measure(
    args: &Args,
    cx: &Context,
    engine: &Engine,
    spec: &SandboxSpec,
    scratch: &Path,
) -> Result<[Vec<f64>; METRICS.len()], CliError> {
    let failed = |error| CliError::io(format!("writing {}", scratch.display()), error);
    let (file, tree) = (scratch.join("file"), scratch.join("tree"));
    std::fs::create_dir_all(&tree).map_err(failed)?;
    // Not zeros: what is nothing but holes would be copied as such.
    let content = vec![0x5a; usize::try_from(FILE_MIB).unwrap_or(0) << 20];
    std::fs::write(&file, &content).map_err(failed)?;
    for number in 0..TREE_FILES {
        let path = tree.join(number.to_string());
        std::fs::write(path, &content[..TREE_FILE_BYTES]).map_err(failed)?;
    }
    engine.create(spec)?;
    let (session, _) = engine.start(spec.name.as_str()).await?;
    let mut values: [Vec<f64>; METRICS.len()] = std::array::from_fn(|_| Vec::new());
    for turn in 1..=args.iterations {
        let copies = [
            (true, file.as_path(), "/root/file", FILE_MIB),
            (false, file.as_path(), "/root/file", FILE_MIB),
            (true, tree.as_path(), "/root/tree", TREE_FILES),
            (false, tree.as_path(), "/root/tree", TREE_FILES),
        ];
        for ((inwards, local, guest, amount), values) in copies.into_iter().zip(&mut values) {
            values.push(f64::from(amount) / copy(&session, inwards, local, guest, turn).await?);
        }
        cx.out.status(&format!("{turn} of {}", args.iterations));
    }
    Ok(values)
}

/// Copies to or from a name that is new each time; the seconds it took.
async fn copy(
    session: &Session,
    inwards: bool,
    local: &Path,
    guest: &str,
    turn: u32,
) -> Result<f64, CliError> {
    let options = CopyOptions::default();
    let guest = format!("{guest}-{turn}");
    let back = local.with_extension(turn.to_string());
    let began = Instant::now();
    if inwards {
        session
            .upload(local, &guest, &options, &mut |_, _| {})
            .await?;
    } else {
        session
            .download(&guest, &back, &options, &mut |_, _| {})
            .await?;
    }
    Ok(began.elapsed().as_secs_f64())
}

fn show(
    cx: &Context,
    args: &Args,
    series: &[Series],
    stamp: &Map<String, Value>,
) -> Result<(), CliError> {
    let rows = METRICS.iter().zip(series).map(|((name, _, unit), series)| {
        let cell = |percent| format!("{:.1}", series.percentile(percent));
        vec![
            (*name).to_owned(),
            cell(50),
            cell(0),
            cell(100),
            (*unit).to_owned(),
        ]
    });
    cx.out
        .table(&["FILES", "P50", "MIN", "MAX", "UNIT"], rows.collect())?;
    cx.out.line("")?;
    cx.out.line(&format!("n: {} of each", args.iterations))?;
    for (name, value) in stamp {
        let text = value
            .as_str()
            .map_or_else(|| value.to_string(), str::to_owned);
        cx.out.line(&format!("{name}: {text}"))?;
    }
    Ok(())
}

fn data(args: &Args, series: &[Series], stamp: Map<String, Value>) -> Value {
    let results: Map<String, Value> = METRICS
        .iter()
        .zip(series)
        .map(|((_, name, unit), series)| {
            let stats = json!({
                "p50": series.percentile(50),
                "mean": series.mean(),
                "min": series.percentile(0),
                "max": series.percentile(100),
            });
            (
                (*name).to_owned(),
                json!({ "unit": unit, "stats": stats, "raw": series.raw }),
            )
        })
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "environment": stamp,
        "image": args.image,
        "iterations": args.iterations,
        "results": results,
    })
}
