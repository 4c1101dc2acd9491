//! Version N with N-1, and with N+1. No older program is built: what one sends is written out here,
//! field by field, as its `.proto` had it.
use anyhow::{Context as _, Result, ensure};
use cairn_proto::reason::{ErrorReason, of_status};
use cairn_proto::signing::sign_session;
use cairn_proto::v1;
use cairn_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::suite::{Stage, Told};
use super::world::{Setting, World};
use crate::adapters::honest;
use crate::member::Member;
use crate::tiny::round_file;

/// Messages as the bytes they are.
#[derive(Debug, Clone, Copy, Default)]
struct Bytes;

impl Codec for Bytes {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        use bytes::BufMut as _;
        to.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Bytes {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        use bytes::Buf as _;
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

/// A field of bytes or text.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    assert!(number < 16 && bytes.len() < 128, "one byte each");
    let mut out = vec![number << 3 | 2, bytes.len() as u8];
    out.extend(bytes);
    out
}

/// A client that writes its own messages.
struct Raw {
    channel: Channel,
    token: MetadataValue<Ascii>,
}

impl Raw {
    /// As this member, on a line of its own.
    async fn of(world: &World, member: &Member) -> Result<Self> {
        let channel = Endpoint::from_shared(format!("http://{}", world.address))?
            .connect()
            .await?;
        let mut enrolment = EnrollmentServiceClient::new(channel.clone());
        let key = &member.client.identity().key;
        let public_key = key.verifying_key().to_bytes().to_vec();
        let challenge = enrolment
            .create_challenge(v1::CreateChallengeRequest { public_key })
            .await?
            .into_inner()
            .challenge;
        let session = enrolment
            .create_session(sign_session(key, &challenge))
            .await?
            .into_inner();
        let token = format!("Bearer {}", session.session_token).parse()?;
        Ok(Self { channel, token })
    }

    async fn call(&self, path: &'static str, message: Vec<u8>) -> Result<Vec<u8>, Status> {
        let mut to = tonic::client::Grpc::new(self.channel.clone());
        to.ready()
            .await
            .map_err(|error| Status::unknown(error.to_string()))?;
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("authorization", self.token.clone());
        let path = PathAndQuery::from_static(path);
        Ok(to.unary(request, path, Bytes).await?.into_inner())
    }
}

const RENEW: &str = "/cairn.v1.WorkService/RenewLease";
const CLAIM: &str = "/cairn.v1.WorkService/ClaimWork";
const STANDING: &str = "/cairn.v1.VolunteerService/GetStanding";

fn plain() -> Setting {
    Setting {
        plain: true,
        ..Setting::default()
    }
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn older_client(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(plain()).await?;
    let unaudited = round_file(1).replace("[policy]\n", "[policy]\nsegments = 0\n");
    let round = world.maintainer().open_round(&unaudited).await?;
    let bob = world.volunteer("bob").await?;
    let raw = Raw::of(world, &bob).await?;
    // No wait, which came later; no steps and no loss.
    raw.call(CLAIM, Vec::new()).await.context("a claim")?;
    let lease = bob.lease().await?;
    let mut renewal = field(1, lease.id.as_bytes());
    renewal.extend([2 << 3, u8::try_from(lease.generation)?]);
    raw.call(RENEW, renewal).await.context("a renewal")?;
    // A submission without a commitment, and with numbers left out: as before there were audits.
    let adapter = honest(1);
    bob.upload(&adapter.weights, &lease.id).await?;
    let mut request = bob.submission(&lease, &adapter);
    request.commitment = None;
    request.numbers = Some(v1::TrainNumbers {
        steps: 3,
        tokens: 200,
        ..Default::default()
    });
    let key = &bob.client.identity().key;
    cairn_proto::signing::sign_submission(key, &lease.nonce, &mut request)?;
    world.submit(&bob, &lease, &request, &adapter).await?;
    world.publish(&round).await?;
    // A round that asks for what it cannot give says so, in words.
    world.maintainer().open_round(&round_file(1)).await?;
    let carol = world.volunteer("carol").await?;
    let lease = carol.lease().await?;
    let adapter = honest(2);
    carol.upload(&adapter.weights, &lease.id).await?;
    let mut request = carol.submission(&lease, &adapter);
    request.commitment = None;
    let key = &carol.client.identity().key;
    cairn_proto::signing::sign_submission(key, &lease.nonce, &mut request)?;
    let Err(error) = carol.submit(&request).await else {
        anyhow::bail!("a round with audits takes a submission without a commitment");
    };
    ensure!(
        error.reason() == Some(ErrorReason::InvalidArgument)
            && error.to_string().contains("update cairn-worker"),
        "{error}"
    );
    Ok(Told::saw(
        "claim, renewal and submission without the newer fields; told to update where they are asked for",
    ))
}

/// See the table.
///
/// # Errors
/// When it is not as expected.
pub async fn newer_client(stage: &mut Stage) -> Result<Told> {
    let world = stage.set(plain()).await?;
    let round = world.maintainer().open_round(&round_file(1)).await?;
    let bob = world.volunteer("bob").await?;
    let raw = Raw::of(world, &bob).await?;
    // Fields that nobody here knows, in every wire type.
    let mut unknown = vec![15 << 3, 1];
    unknown.extend(field(14, b"new"));
    unknown.extend([13 << 3 | 5, 1, 2, 3, 4]);
    unknown.extend([12 << 3 | 1, 1, 2, 3, 4, 5, 6, 7, 8]);
    raw.call(STANDING, unknown.clone())
        .await
        .context("a question")?;
    let lease = raw.call(CLAIM, unknown.clone()).await.context("a claim")?;
    ensure!(!lease.is_empty(), "no lease");
    let lease = bob.lease().await?;
    let mut renewal = field(1, lease.id.as_bytes());
    renewal.extend([2 << 3, u8::try_from(lease.generation)?]);
    renewal.extend(unknown);
    raw.call(RENEW, renewal).await.context("a renewal")?;
    for path in [
        "/cairn.v1.WorkService/ClaimTwice",
        "/cairn.v2.WorkService/ClaimWork",
    ] {
        let Err(status) = raw.call(path, Vec::new()).await else {
            anyhow::bail!("{path} is answered");
        };
        ensure!(status.code() == Code::Unimplemented, "{path}: {status}");
    }
    // What is no message at all.
    let Err(status) = raw.call(STANDING, vec![0xff; 40]).await else {
        anyhow::bail!("rubble is answered");
    };
    ensure!(
        of_status(&status) != Some(ErrorReason::Internal),
        "rubble: {status}"
    );
    world.hand_in(&bob, &lease, &honest(1)).await?;
    world.publish(&round).await?;
    Ok(Told::saw(
        "4 kinds of unknown field passed over, 2 unknown methods refused",
    ))
}
