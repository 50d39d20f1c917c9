//! Images: getting one from S3, and measuring one.

use super::run::{Cost, Program};
use super::table::{Row, Table};
use crate::processes::Owned;
use crate::{binaries, eif};
use anyhow::{Context as _, ensure};
use enclaved::host::{ImageStore as _, image_store::Store};
use enclaved_core::desired::ImageRequest;
use enclaved_core::image::ExpectedImage;
use enclaved_core::plan::Prefer;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// The comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Only {
    Fetch,
    Measure,
}

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// The image's size.
    #[arg(long, default_value = "1GiB", value_parser = super::size)]
    size: u64,
    /// How often each contender runs.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// One comparison only.
    #[arg(long, value_enum)]
    only: Option<Only>,
    /// A file for the figures of every round.
    #[arg(long)]
    json: Option<PathBuf>,
}

type Before<'a> = Box<dyn Fn() -> anyhow::Result<()> + 'a>;
type Judge<'a> = Box<dyn Fn(&str) -> anyhow::Result<String> + 'a>;

/// One contender: how it is run, and how what it did is checked.
struct Contender<'a> {
    what: &'static str,
    program: Program,
    /// Before every run.
    before: Before<'a>,
    /// Gets what it printed; gives what must be the same for all contenders.
    result: Judge<'a>,
}

/// `bench images`.
pub(super) fn compare(options: &Options) -> anyhow::Result<()> {
    crate::demo::build_beside("enclavectl")?;
    let folder = tempfile::tempdir().context("making a folder")?;
    let image = folder.path().join("image.eif");
    eif::write_sample(File::create(&image)?, "bench", 1, options.size).context("writing the image")?;
    let size = fs::metadata(&image)?.len();
    let table = |what: &str, contenders: &Contenders<'_>| -> anyhow::Result<Table> {
        let title = format!("{what}, {} MiB, {} rounds", (size + MIB / 2) / MIB, options.rounds);
        Ok(Table { title, size, rows: rounds(contenders, options.rounds, folder.path())? })
    };
    let mut tables = Vec::new();
    if options.only != Some(Only::Measure) {
        let contenders = fetching(&image, folder.path(), &binaries::of_others("aws")?)?;
        tables.push(table("fetch: an object of a local S3 server", &contenders)?);
    }
    if options.only != Some(Only::Fetch) {
        let contenders = measuring(&image, folder.path(), &binaries::of_others("nitro-cli")?)?;
        tables.push(table("measure: a file in the page cache", &contenders)?);
    }
    for table in &tables {
        println!("{table}");
    }
    if let [Table { rows: fetched, .. }, Table { rows: measured, .. }] = tables.as_slice()
        && let ([ours, fetch], [_, measure]) = (fetched.as_slice(), measured.as_slice())
    {
        println!("To have an image that is proven (fetched and measured):\n  {}", ours.said());
        println!("  {}", fetch.and_then(measure).said());
    }
    if let Some(path) = &options.json {
        fs::write(path, serde_json::to_vec_pretty(&tables)?).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// Runs the contenders in turn.
fn rounds(contenders: &Contenders<'_>, count: u32, scratch: &Path) -> anyhow::Result<Vec<Row>> {
    let mut costs: Vec<Vec<Cost>> = contenders.all.iter().map(|_| Vec::new()).collect();
    for round in 0..count {
        let mut order: Vec<_> = contenders.all.iter().zip(&mut costs).collect();
        if round % 2 == 1 {
            order.reverse();
        }
        let mut results = Vec::new();
        for (contender, costs) in order {
            (contender.before)()?;
            let (cost, printed) = contender.program.run(scratch)?;
            results.push((contender.result)(&printed).with_context(|| contender.what)?);
            costs.push(cost);
        }
        ensure!(
            results.windows(2).all(|two| two[0] == two[1]),
            "the contenders came to different results: {results:?}"
        );
    }
    Ok(contenders.all.iter().zip(costs).map(|(contender, costs)| Row::new(contender.what, costs)).collect())
}

struct Contenders<'a> {
    all: Vec<Contender<'a>>,
    _server: Option<Owned>,
}

fn fetching<'a>(image: &'a Path, folder: &Path, aws: &Path) -> anyhow::Result<Contenders<'a>> {
    let mut serving = Command::new(std::env::current_exe()?);
    serving.arg("serve").arg(image).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut server = Owned(serving.spawn().context("starting the S3 server")?);
    let mut url = String::new();
    let out = server.0.stdout.take().context("the S3 server's output")?;
    BufReader::new(out).read_line(&mut url).context("waiting for the S3 server")?;
    let url = url.trim();
    ensure!(!url.is_empty(), "the S3 server did not start");
    let environment: BTreeMap<&'static str, OsString> = [
        ("AWS_ENDPOINT_URL", url),
        // It has no credentials to hand out, and says so at once.
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", url),
        ("AWS_REGION", "us-east-1"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ACCESS_KEY_ID", "AKIABENCHBENCHBENCHB"),
        ("AWS_SECRET_ACCESS_KEY", "bench"),
        ("AWS_CONFIG_FILE", "/dev/null"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"),
    ]
    .map(|(name, value)| (name, value.into()))
    .into();
    let source = "s3://bench-images/image.eif";
    let cache = folder.join("cache");
    let copy = folder.join("copy.eif");
    let (of_cache, of_copy) = (cache.clone(), copy.clone());
    let (in_cache, in_copy) = (cache.clone(), copy.clone());
    let program =
        |path: OsString, arguments: Vec<OsString>| Program { path, arguments, environment: environment.clone() };
    let ours = Contender {
        what: "enclaved: fetched, measured, verified, kept",
        program: program(
            std::env::current_exe()?.into(),
            vec!["fetch".into(), source.into(), cache.as_os_str().to_owned()],
        ),
        before: Box::new(move || empty(&of_cache, &of_copy)),
        result: Box::new(move |printed| {
            same(&in_cache.join(format!("{}.eif", printed.trim())), image)?;
            Ok("the image".to_owned())
        }),
    };
    let (of_cache, of_copy) = (cache, copy.clone());
    let theirs = Contender {
        what: "aws s3 cp: fetched",
        program: program(
            aws.into(),
            ["s3", "cp", "--only-show-errors", source].map(OsString::from).into_iter().chain([copy.into()]).collect(),
        ),
        before: Box::new(move || empty(&of_cache, &of_copy)),
        result: Box::new(move |_| {
            same(&in_copy, image)?;
            Ok("the image".to_owned())
        }),
    };
    Ok(Contenders { all: vec![ours, theirs], _server: Some(server) })
}

fn measuring<'a>(image: &'a Path, folder: &Path, nitro_cli: &Path) -> anyhow::Result<Contenders<'a>> {
    let pcr0 = |printed: &str, pointer: &str| -> anyhow::Result<String> {
        let value: Value = serde_json::from_str(printed).context("what it printed")?;
        let pcr0 =
            value.pointer(pointer).and_then(Value::as_str).with_context(|| format!("no {pointer} in {value}"))?;
        Ok(pcr0.to_ascii_lowercase())
    };
    let ours = Contender {
        what: "enclavectl measure",
        program: Program {
            path: binaries::find("enclavectl")?.into(),
            arguments: vec!["measure".into(), "--json".into(), image.into()],
            environment: BTreeMap::new(),
        },
        before: Box::new(|| Ok(())),
        result: Box::new(move |printed| pcr0(printed, "/measurements/pcr0")),
    };
    let theirs = Contender {
        what: "nitro-cli describe-eif",
        program: Program {
            path: nitro_cli.into(),
            arguments: vec!["describe-eif".into(), "--eif-path".into(), image.into()],
            environment: BTreeMap::from([("NITRO_CLI_LOGS_PATH", folder.into()), ("HOME", folder.into())]),
        },
        before: Box::new(|| Ok(())),
        result: Box::new(move |printed| pcr0(printed, "/Measurements/PCR0")),
    };
    Ok(Contenders { all: vec![ours, theirs], _server: None })
}

/// Removes what an earlier run got, so that no contender finds it, or writes over it.
fn empty(cache: &Path, copy: &Path) -> anyhow::Result<()> {
    for done in [fs::remove_dir_all(cache), fs::remove_file(copy)] {
        match done {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

/// Whether that file is the image, byte for byte.
fn same(path: &Path, image: &Path) -> anyhow::Result<()> {
    let open = |path: &Path| File::open(path).with_context(|| format!("opening {}", path.display()));
    let (mut ours, mut theirs) =
        (BufReader::with_capacity(1 << 20, open(path)?), BufReader::with_capacity(1 << 20, open(image)?));
    loop {
        let (one, other) = (ours.fill_buf()?, theirs.fill_buf()?);
        let count = one.len().min(other.len());
        ensure!(
            one[..count] == other[..count] && (count > 0 || one.len() == other.len()),
            "{} is not the image",
            path.display()
        );
        if count == 0 {
            return Ok(());
        }
        ours.consume(count);
        theirs.consume(count);
    }
}

/// `bench fetch`: gets an image with the daemon's own code, and prints its digest.
pub(super) fn fetch(source: &str, folder: &Path) -> anyhow::Result<()> {
    let request = ImageRequest { source: source.parse()?, expected: ExpectedImage::default() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let failed = |failure: enclaved_core::failure::Failure| anyhow::anyhow!("{failure}");
    let image = runtime.block_on(async {
        let store = Store::new(folder).map_err(failed)?;
        store.fetch(&request, Prefer::Cached, Arc::default()).await.map_err(failed)
    })?;
    println!("{}", image.digest());
    Ok(())
}
