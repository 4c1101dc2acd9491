//! The demo's cheat: enrols like anybody, claims a shard, trains nothing, and hands in random
//! factors of the right names and shapes. It stops at its first rejection and tells the reason.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cairn_proto::client::{self, Client, Options};
use cairn_proto::convert::{BlobName, verdict_word};
use cairn_proto::identity::WORKER_FILE;
use cairn_proto::url::JoinUrl;
use cairn_proto::v1::lease::Work;
use cairn_proto::v1::{
    ClaimWorkRequest, Lease, ListSubmissionsRequest, RevealedState, SubmitAdapterRequest,
    TrainCommitment, TrainNumbers, TrainWork, Verdict,
};
use cairn_proto::{limits, signing};
use cairn_stack::adapter::{
    AdapterSpec, AdapterWriteConfig, CONFIG_FILE, Pair, WEIGHTS_FILE, write_adapter,
};
use cairn_stack::config::ModelConfig;
use cairn_stack::digest::Digest;
use cairn_stack::merkle::{Hash, inclusion_proof, leaf_hash, root};
use cairn_stack::recipe::Recipe;
use clap::Args;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use crate::session;

/// Factors are drawn from [-FACTOR_MAX, FACTOR_MAX]: about the size of honest ones, so that it is
/// the effect on the model that gives the cheat away.
const FACTOR_MAX: f32 = 0.3;

/// Optimiser steps that it says it took.
const STEPS_CLAIMED: u32 = 40;

/// How often the verdict is asked for.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// How long the cheat waits for work and for a verdict before it gives up.
const PATIENCE_TRIES: u32 = 600;

/// The demo's cheat.
#[derive(Debug, Args)]
pub struct CheatArgs {
    /// Join URL of a volunteer
    url: String,
    /// Folder for its identity
    #[arg(long)]
    dir: PathBuf,
    /// Seed of its random factors
    #[arg(long, default_value_t = 7)]
    seed: u64,
}

/// Runs the cheat until its adapter has been judged.
pub async fn cheat(args: CheatArgs) -> Result<()> {
    let url: JoinUrl = args.url.parse().context("read the join URL")?;
    let options = Options::default();
    let identity = client::join(&url, "mallory", &args.dir.join(WORKER_FILE), &options).await?;
    let client = Client::new(identity, options)?;
    let (lease, work) = claim(&client).await?;
    eprintln!("claimed shard {} and trains nothing", work.shard);
    let submission = submit(&client, &lease, &work, &args).await?;
    eprintln!("handed in random factors as {submission}");
    for _ in 0..PATIENCE_TRIES {
        let answer = client
            .call(|mut to| async move {
                to.volunteer
                    .list_submissions(ListSubmissionsRequest::default())
                    .await
            })
            .await?;
        for own in answer
            .submissions
            .iter()
            .filter_map(|own| own.contribution.as_ref())
        {
            if own.id == submission && own.verdict() != Verdict::Pending {
                println!(
                    "{} {} {}",
                    verdict_word(own.verdict()),
                    own.reason,
                    own.detail
                );
                return Ok(());
            }
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
    bail!("no verdict came")
}

async fn claim(client: &Client) -> Result<(Lease, TrainWork)> {
    let wait_ms = i64::try_from(limits::CLAIM_WAIT_MAX.as_millis())? / 10;
    for _ in 0..PATIENCE_TRIES {
        let answer = client
            .call(|mut to| async move { to.work.claim_work(ClaimWorkRequest { wait_ms }).await })
            .await?;
        if let Some(lease) = answer.lease
            && let Some(Work::Train(work)) = lease.work.clone()
        {
            return Ok((lease, work));
        }
    }
    bail!("no work came")
}

async fn submit(
    client: &Client,
    lease: &Lease,
    work: &TrainWork,
    args: &CheatArgs,
) -> Result<String> {
    let folder = args.dir.join("poison");
    let recipe = Recipe::parse_toml(&work.recipe).context("read the recipe")?;
    let config = base_config(client, work, &args.dir).await?;
    write_poison(&folder, &config, &recipe, args.seed)?;
    let weights = folder.join(WEIGHTS_FILE);
    let (digest, size_bytes) = Digest::of_file(&weights).context("hash the poison")?;
    let blob = BlobName { digest, size_bytes };
    client.upload(&weights, blob, &lease.id, &|_| ()).await?;
    let mut request = SubmitAdapterRequest {
        request_id: session::request_id(),
        lease_id: lease.id.clone(),
        generation: lease.generation,
        adapter: Some(blob.into()),
        adapter_config: std::fs::read(folder.join(CONFIG_FILE))
            .context("read the poison's config")?,
        // A made-up training log: nobody believes it anyway.
        numbers: Some(TrainNumbers {
            steps: STEPS_CLAIMED,
            tokens: 20_000,
            scored_tokens: 10_000,
            seconds: 20.0,
            first_loss: 3.0,
            last_loss: 1.0,
            device: "flex".to_owned(),
        }),
        signature: Vec::new(),
        commitment: made_up(blob, work.segments),
    };
    signing::sign_submission(&client.identity().key, &lease.nonce, &mut request)?;
    let answer = client
        .call(|mut to| {
            let request = request.clone();
            async move { to.work.submit_adapter(request).await }
        })
        .await?;
    Ok(answer.submission_id)
}

/// A commitment to a training that never was: only its last state is true, for that is the adapter.
/// Whoever draws an audit finds out; the gate is faster.
fn made_up(adapter: BlobName, segments: u32) -> Option<TrainCommitment> {
    if segments == 0 {
        return None;
    }
    let nothing = Digest::of(b"nothing was trained");
    let mut steps: Vec<u32> = (0..=segments)
        .map(|k| k * STEPS_CLAIMED / segments)
        .collect();
    steps.dedup();
    let last = u64::try_from(steps.len()).ok()?.checked_sub(1)?;
    let leaf = |step: &u32| {
        let factors = if *step == STEPS_CLAIMED {
            adapter.digest
        } else {
            nothing
        };
        leaf_hash(&signing::state_leaf(*step, factors, nothing))
    };
    let leaves: Vec<Hash> = steps.iter().map(leaf).collect();
    let moments = BlobName {
        digest: nothing,
        size_bytes: 1,
    };
    Some(TrainCommitment {
        root: root(&leaves).to_vec(),
        leaves: u32::try_from(leaves.len()).ok()?,
        last: Some(RevealedState {
            step: STEPS_CLAIMED,
            factors: Some(adapter.into()),
            moments: Some(moments.into()),
            proof: inclusion_proof(&leaves, last)?
                .into_iter()
                .map(Vec::from)
                .collect(),
        }),
    })
}

async fn base_config(client: &Client, work: &TrainWork, dir: &Path) -> Result<ModelConfig> {
    let file = work
        .base_files
        .iter()
        .find(|file| file.path == "config.json")
        .context("the base has no config.json")?;
    let blob = BlobName::try_from(file.blob.as_ref().context("config.json has no blob")?)?;
    let path = dir.join("config.json");
    client.download(blob, &path, &|_| ()).await?;
    Ok(ModelConfig::from_json(&std::fs::read(&path)?)?)
}

fn write_poison(folder: &Path, config: &ModelConfig, recipe: &Recipe, seed: u64) -> Result<()> {
    let spec = AdapterSpec::new(config, recipe);
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let mut factor = |count: usize| {
        (0..count)
            .map(|_| rng.random_range(-FACTOR_MAX..=FACTOR_MAX))
            .collect::<Vec<f32>>()
    };
    let pairs: Vec<Pair> = spec
        .pairs
        .iter()
        .map(|pair| Pair {
            module: pair.module.clone(),
            rank: spec.rank,
            in_features: pair.in_features,
            out_features: pair.out_features,
            a: factor(spec.rank * pair.in_features),
            b: factor(spec.rank * pair.out_features),
            scale: spec.scale,
        })
        .collect();
    std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    write_adapter(
        folder,
        &pairs,
        &AdapterWriteConfig::of_recipe(recipe, None, None),
    )
    .context("write the poison")
}
