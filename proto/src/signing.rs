//! What is signed, byte for byte, and by whom.
//!
//! A statement is its context string and its fields, each with its length before it as a 32-bit
//! little-endian number, so that no two different statements have the same bytes. Numbers are
//! little-endian, floats their IEEE 754 bits. Signatures are Ed25519 and checked with
//! `verify_strict`, which admits neither small-order keys nor malleable signatures.
use cairn_stack::digest::{Digest, DigestHasher};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};

use crate::v1;

const ENROL: &str = "cairn.v1 enrol";
const SESSION: &str = "cairn.v1 session";
const SUBMISSION: &str = "cairn.v1 submission";
const SCORES: &str = "cairn.v1 scores";
const FINDINGS: &str = "cairn.v1 findings";
const STATE: &str = "cairn.v1 training state";
const RECEIPT: &str = "cairn.v1 receipt";
const TREE_HEAD: &str = "cairn.v1 tree head";

/// A signature that does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The key is not a valid Ed25519 public key of 32 bytes.
    #[error("not an Ed25519 public key")]
    Key,
    /// The signature is malformed or another's.
    #[error("the signature does not fit the key and the statement")]
    Signature,
    /// The statement lacks a part or cannot be read.
    #[error("the signed statement is incomplete or malformed")]
    Statement,
}

/// Bytes to be signed.
struct Statement(Vec<u8>);

impl Statement {
    fn new(context: &str) -> Self {
        Self(Vec::with_capacity(256)).bytes(context.as_bytes())
    }

    fn bytes(mut self, field: &[u8]) -> Self {
        // No field reaches 4 GiB: messages end at 4 MiB.
        let length = u32::try_from(field.len()).unwrap_or(u32::MAX);
        self.0.extend_from_slice(&length.to_le_bytes());
        self.0.extend_from_slice(field);
        self
    }

    fn text(self, field: &str) -> Self {
        self.bytes(field.as_bytes())
    }

    fn number(self, field: u64) -> Self {
        self.bytes(&field.to_le_bytes())
    }

    fn float(self, field: f64) -> Self {
        self.number(field.to_bits())
    }

    fn sign(&self, key: &SigningKey) -> Vec<u8> {
        key.sign(&self.0).to_bytes().to_vec()
    }

    fn verify(&self, public_key: &[u8], signature: &[u8]) -> Result<(), SignatureError> {
        let key = parse_public_key(public_key)?;
        let signature = Signature::from_slice(signature).map_err(|_| SignatureError::Signature)?;
        key.verify_strict(&self.0, &signature)
            .map_err(|_| SignatureError::Signature)
    }
}

/// Reads a public key of 32 bytes.
///
/// # Errors
/// [`SignatureError::Key`] when it is not a point of the curve.
pub fn parse_public_key(bytes: &[u8]) -> Result<VerifyingKey, SignatureError> {
    let bytes: &[u8; 32] = bytes.try_into().map_err(|_| SignatureError::Key)?;
    VerifyingKey::from_bytes(bytes).map_err(|_| SignatureError::Key)
}

fn enrolment(request: &v1::EnrollRequest) -> Statement {
    // The token is a secret: only its digest is part of what is signed.
    Statement::new(ENROL)
        .bytes(Digest::of(request.join_token.as_bytes()).as_bytes())
        .bytes(&request.public_key)
        .text(&request.display_name)
}

/// Signs an enrolment; fills in `public_key` and `signature`.
pub fn sign_enrolment(key: &SigningKey, request: &mut v1::EnrollRequest) {
    request.public_key = key.verifying_key().to_bytes().to_vec();
    request.signature = enrolment(request).sign(key);
}

/// Checks that the sender of an enrolment holds the key it names.
///
/// # Errors
/// When the key or the signature is bad.
pub fn verify_enrolment(request: &v1::EnrollRequest) -> Result<(), SignatureError> {
    enrolment(request).verify(&request.public_key, &request.signature)
}

fn session(public_key: &[u8], challenge: &[u8]) -> Statement {
    Statement::new(SESSION).bytes(public_key).bytes(challenge)
}

/// Answers a challenge.
#[must_use]
pub fn sign_session(key: &SigningKey, challenge: &[u8]) -> v1::CreateSessionRequest {
    let public_key = key.verifying_key().to_bytes().to_vec();
    let signature = session(&public_key, challenge).sign(key);
    v1::CreateSessionRequest {
        public_key,
        challenge: challenge.to_vec(),
        signature,
    }
}

/// Checks the answer to a challenge. That the challenge is fresh is the caller's to check.
///
/// # Errors
/// When the key or the signature is bad.
pub fn verify_session(request: &v1::CreateSessionRequest) -> Result<(), SignatureError> {
    session(&request.public_key, &request.challenge).verify(&request.public_key, &request.signature)
}

/// Lease, generation and nonce; adapter digest and size; digest of the config; the numbers; the
/// commitment.
fn submission(
    request: &v1::SubmitAdapterRequest,
    nonce: &[u8],
) -> Result<Statement, SignatureError> {
    let adapter = request.adapter.as_ref().ok_or(SignatureError::Statement)?;
    let numbers = request.numbers.clone().unwrap_or_default();
    // The last state's proof needs no signature: it holds under the root or it does not.
    let commitment = request.commitment.clone().unwrap_or_default();
    Ok(Statement::new(SUBMISSION)
        .text(&request.lease_id)
        .number(request.generation)
        .bytes(nonce)
        .text(&adapter.digest)
        .number(adapter.size_bytes)
        .bytes(Digest::of(&request.adapter_config).as_bytes())
        .number(u64::from(numbers.steps))
        .number(numbers.tokens)
        .number(numbers.scored_tokens)
        .float(numbers.seconds)
        .float(numbers.first_loss)
        .float(numbers.last_loss)
        .text(&numbers.device)
        .bytes(&commitment.root)
        .number(u64::from(commitment.leaves)))
}

/// What a leaf of a [`v1::TrainCommitment`] hashes: the step, and the BLAKE3 of the files of factors
/// and moments.
#[must_use]
pub fn state_leaf(step: u32, factors: Digest, moments: Digest) -> Vec<u8> {
    Statement::new(STATE)
        .number(u64::from(step))
        .bytes(factors.as_bytes())
        .bytes(moments.as_bytes())
        .0
}

/// Signs a submission under the lease's nonce; fills in `signature`.
///
/// # Errors
/// [`SignatureError::Statement`] when the request names no adapter.
pub fn sign_submission(
    key: &SigningKey,
    nonce: &[u8],
    request: &mut v1::SubmitAdapterRequest,
) -> Result<(), SignatureError> {
    request.signature = submission(request, nonce)?.sign(key);
    Ok(())
}

/// Checks a submission's signature against the key and the lease's nonce.
///
/// # Errors
/// When the statement is incomplete, or the key or the signature is bad.
pub fn verify_submission(
    public_key: &[u8],
    nonce: &[u8],
    request: &v1::SubmitAdapterRequest,
) -> Result<(), SignatureError> {
    submission(request, nonce)?.verify(public_key, &request.signature)
}

/// BLAKE3 over the canonical encoding of the scores: for each set its name, its counts, the bits
/// of each loss and each token count.
#[must_use]
pub fn scores_digest(sets: &[v1::SetScores]) -> Digest {
    let mut hasher = DigestHasher::new();
    for set in sets {
        let head = Statement(Vec::new())
            .text(&set.dataset)
            .number(set.nll.len() as u64)
            .number(set.tokens.len() as u64)
            .number(u64::from(set.cut));
        hasher.update(&head.0);
        for nll in &set.nll {
            hasher.update(&nll.to_bits().to_le_bytes());
        }
        for tokens in &set.tokens {
            hasher.update(&tokens.to_le_bytes());
        }
    }
    hasher.finish().0
}

fn scores(request: &v1::SubmitScoresRequest, nonce: &[u8]) -> Statement {
    Statement::new(SCORES)
        .text(&request.lease_id)
        .number(request.generation)
        .bytes(nonce)
        .bytes(scores_digest(&request.sets).as_bytes())
}

/// Signs scores under the lease's nonce; fills in `signature`.
pub fn sign_scores(key: &SigningKey, nonce: &[u8], request: &mut v1::SubmitScoresRequest) {
    request.signature = scores(request, nonce).sign(key);
}

/// Checks the signature of scores against the key and the lease's nonce.
///
/// # Errors
/// When the key or the signature is bad.
pub fn verify_scores(
    public_key: &[u8],
    nonce: &[u8],
    request: &v1::SubmitScoresRequest,
) -> Result<(), SignatureError> {
    scores(request, nonce).verify(public_key, &request.signature)
}

/// The findings by their protobuf encoding, which is the same for the same message within this
/// version of the contract.
fn findings(request: &v1::SubmitFindingsRequest, nonce: &[u8]) -> Statement {
    let content = v1::SubmitFindingsRequest {
        findings: request.findings.clone(),
        ..Default::default()
    };
    Statement::new(FINDINGS)
        .text(&request.lease_id)
        .number(request.generation)
        .bytes(nonce)
        .bytes(Digest::of(&prost::Message::encode_to_vec(&content)).as_bytes())
}

/// Signs findings under the lease's nonce; fills in `signature`.
pub fn sign_findings(key: &SigningKey, nonce: &[u8], request: &mut v1::SubmitFindingsRequest) {
    request.signature = findings(request, nonce).sign(key);
}

/// Checks the signature of findings against the key and the lease's nonce.
///
/// # Errors
/// When the key or the signature is bad.
pub fn verify_findings(
    public_key: &[u8],
    nonce: &[u8],
    request: &v1::SubmitFindingsRequest,
) -> Result<(), SignatureError> {
    findings(request, nonce).verify(public_key, &request.signature)
}

/// What a receipt states. Its JSON, fields in this order and without spaces, is what is signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiptStatement {
    /// The submission's id.
    pub submission: String,
    /// The lease it was handed in under.
    pub lease: String,
    /// Who handed it in.
    pub worker: String,
    /// The round.
    pub round: String,
    /// The shard's index.
    pub shard: u32,
    /// BLAKE3 of `adapter_model.safetensors`.
    pub adapter: Digest,
    /// Its length in bytes.
    pub adapter_bytes: u64,
    /// When it was acknowledged, milliseconds since 1970 by the coordinator's clock.
    pub received_ms: i64,
    /// `pending` in the acknowledgement; `accepted` or `rejected` in the receipt of the verdict.
    pub verdict: String,
    /// Stable word of a rejection; empty otherwise.
    pub reason: String,
    /// Verified tokens; 0 while pending.
    pub credit_tokens: u64,
    /// Place of this very statement in the coordinator's log.
    pub log_index: u64,
}

impl ReceiptStatement {
    /// Signs with the coordinator's key.
    ///
    /// # Errors
    /// Never for statements built from valid ids; [`SignatureError::Statement`] otherwise.
    pub fn sign(&self, key: &SigningKey) -> Result<v1::Receipt, SignatureError> {
        let statement = serde_json::to_vec(self).map_err(|_| SignatureError::Statement)?;
        let signature = Statement::new(RECEIPT).bytes(&statement).sign(key);
        Ok(v1::Receipt {
            statement,
            signature,
        })
    }

    /// Checks a receipt against the coordinator's public key and reads it.
    ///
    /// # Errors
    /// When the signature does not hold or the statement cannot be read.
    pub fn verify(receipt: &v1::Receipt, server_key: &[u8]) -> Result<Self, SignatureError> {
        Statement::new(RECEIPT)
            .bytes(&receipt.statement)
            .verify(server_key, &receipt.signature)?;
        serde_json::from_slice(&receipt.statement).map_err(|_| SignatureError::Statement)
    }
}

/// What a tree head states: size and root of the log. Its JSON, fields in this order and without
/// spaces, is what is signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TreeHeadStatement {
    /// How many entries.
    pub size: u64,
    /// Root of the tree over them, 64 hex digits.
    pub root: String,
    /// When it was signed, milliseconds since 1970 by the coordinator's clock.
    pub time_ms: i64,
}

impl TreeHeadStatement {
    /// Signs with the coordinator's key.
    ///
    /// # Errors
    /// Never in practice; [`SignatureError::Statement`] when it cannot be written.
    pub fn sign(&self, key: &SigningKey) -> Result<v1::TreeHead, SignatureError> {
        let statement = serde_json::to_vec(self).map_err(|_| SignatureError::Statement)?;
        let signature = Statement::new(TREE_HEAD).bytes(&statement).sign(key);
        Ok(v1::TreeHead {
            statement,
            signature,
        })
    }

    /// Checks a head against the coordinator's public key and reads it.
    ///
    /// # Errors
    /// When the signature does not hold or the statement cannot be read.
    pub fn verify(head: &v1::TreeHead, server_key: &[u8]) -> Result<Self, SignatureError> {
        Statement::new(TREE_HEAD)
            .bytes(&head.statement)
            .verify(server_key, &head.signature)?;
        serde_json::from_slice(&head.statement).map_err(|_| SignatureError::Statement)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn submission_request() -> v1::SubmitAdapterRequest {
        v1::SubmitAdapterRequest {
            request_id: "r".into(),
            lease_id: "lease".into(),
            generation: 3,
            adapter: Some(v1::BlobRef {
                digest: Digest::of(b"x").to_string(),
                size_bytes: 1,
            }),
            adapter_config: b"{}".to_vec(),
            numbers: Some(v1::TrainNumbers {
                steps: 4,
                ..Default::default()
            }),
            signature: Vec::new(),
            commitment: None,
        }
    }

    #[test]
    fn submission_is_bound_to_lease_nonce_and_numbers() {
        let public = key(1).verifying_key().to_bytes();
        let mut request = submission_request();
        sign_submission(&key(1), b"nonce", &mut request).unwrap();
        assert_eq!(verify_submission(&public, b"nonce", &request), Ok(()));
        assert!(verify_submission(&public, b"other", &request).is_err());
        assert!(verify_submission(&key(2).verifying_key().to_bytes(), b"nonce", &request).is_err());
        for change in [
            |r: &mut v1::SubmitAdapterRequest| r.generation += 1,
            |r: &mut v1::SubmitAdapterRequest| r.lease_id.push('x'),
            |r: &mut v1::SubmitAdapterRequest| r.adapter_config.push(b' '),
            |r: &mut v1::SubmitAdapterRequest| r.numbers.as_mut().unwrap().steps = 5,
            |r: &mut v1::SubmitAdapterRequest| r.adapter.as_mut().unwrap().size_bytes = 2,
            |r: &mut v1::SubmitAdapterRequest| r.signature.truncate(63),
        ] {
            let mut changed = request.clone();
            change(&mut changed);
            assert!(verify_submission(&public, b"nonce", &changed).is_err());
        }
    }

    #[test]
    fn enrolment_and_session_hold() {
        let mut request = v1::EnrollRequest {
            join_token: "t".into(),
            display_name: "ada".into(),
            ..Default::default()
        };
        sign_enrolment(&key(1), &mut request);
        assert_eq!(verify_enrolment(&request), Ok(()));
        request.join_token = "u".into();
        assert!(verify_enrolment(&request).is_err());

        let session = sign_session(&key(1), &[7; 32]);
        assert_eq!(verify_session(&session), Ok(()));
        let stolen = v1::CreateSessionRequest {
            public_key: key(2).verifying_key().to_bytes().to_vec(),
            ..session
        };
        assert!(verify_session(&stolen).is_err());
    }

    #[test]
    fn scores_digest_sees_every_number() {
        let set = |nll: Vec<f32>, tokens: Vec<u32>| {
            vec![v1::SetScores {
                dataset: "g".into(),
                nll,
                tokens,
                cut: 0,
            }]
        };
        let base = scores_digest(&set(vec![1.0, 2.0], vec![1, 2]));
        assert_ne!(base, scores_digest(&set(vec![1.0, 2.5], vec![1, 2])));
        assert_ne!(base, scores_digest(&set(vec![2.0, 1.0], vec![1, 2])));
        assert_ne!(base, scores_digest(&set(vec![1.0, 2.0], vec![2, 1])));
    }

    #[test]
    fn receipt_round_trips_and_refuses_changes() {
        let statement = ReceiptStatement {
            submission: "s".into(),
            lease: "l".into(),
            worker: "w".into(),
            round: "r".into(),
            shard: 3,
            adapter: Digest::of(b"x"),
            adapter_bytes: 1,
            received_ms: 5,
            verdict: "pending".into(),
            reason: String::new(),
            credit_tokens: 0,
            log_index: 3,
        };
        let mut receipt = statement.sign(&key(9)).unwrap();
        let server = key(9).verifying_key().to_bytes();
        assert_eq!(ReceiptStatement::verify(&receipt, &server), Ok(statement));
        receipt.statement.push(b' ');
        assert!(ReceiptStatement::verify(&receipt, &server).is_err());
    }
}
