//! `cairn-chaos`: faults on the real programs, and what was survived. A line as each scenario ends, a
//! table, and one last line of JSON on standard output.
use std::process::ExitCode;

use anyhow::{Result, bail};
use cairn_tests::chaos::report;
use cairn_tests::chaos::suite::{ALL, Scenario, run};
use clap::Parser;

/// Threads: scenarios start programs and wait for them, so more than there are cores.
const THREADS: usize = 8;

/// Cuts lines, kills programs, stops databases, fills disks; and looks whether anything is lost
#[derive(Debug, Parser)]
#[command(
    name = "cairn-chaos",
    version,
    after_help = "Examples:\n  cairn-chaos\n  cairn-chaos --only ack-lost --only disk-full\n  cairn-chaos --list"
)]
struct Cli {
    /// Only this scenario; may be given several times
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Only the quick ones, under half a minute
    #[arg(long)]
    quick: bool,
    /// List the scenarios and what is expected, and play none
    #[arg(long)]
    list: bool,
    /// Only the last line
    #[arg(long)]
    json: bool,
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    let chosen = chosen(&cli)?;
    if cli.list {
        print!("{}", report::list(&chosen));
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()?;
    let all = runtime.block_on(run(&chosen, |played| {
        if !cli.json {
            println!("{}", report::line(played));
        }
    }));
    // A thread may still wait for a file that was made to stall.
    runtime.shutdown_background();
    if !cli.json {
        println!("\n{}", report::table(&all));
    }
    println!("{}", report::json(&all));
    Ok(if report::all_survived(&all) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn chosen(cli: &Cli) -> Result<Vec<&'static Scenario>> {
    let names = || {
        ALL.iter()
            .map(|one| one.name)
            .collect::<Vec<_>>()
            .join(", ")
    };
    if let Some(unknown) = cli
        .only
        .iter()
        .find(|name| !ALL.iter().any(|one| one.name == **name))
    {
        bail!("there is no scenario {unknown}; there are {}", names());
    }
    let wanted = |one: &&Scenario| {
        (cli.only.is_empty() || cli.only.iter().any(|name| name == one.name))
            && (!cli.quick || one.quick)
    };
    Ok(ALL.iter().filter(wanted).collect())
}
