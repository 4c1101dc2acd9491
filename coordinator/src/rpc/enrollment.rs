//! `cairn.v1.EnrollmentService`.
use std::time::Duration;

use cairn_proto::limits::NONCE_BYTES;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::{self, SignatureError, parse_public_key};
use cairn_proto::v1;
use cairn_proto::v1::enrollment_service_server::EnrollmentService;
use ed25519_dalek::VerifyingKey;
use tonic::{Request, Response, Status};

use super::auth::{Role, caller};
use crate::app::App;
use crate::error::Error;
use crate::ops::create_challenge::create_challenge;
use crate::ops::create_join_token::{NewJoinToken, create_join_token};
use crate::ops::create_session::create_session;
use crate::ops::enroll::{NewEnrolment, enroll};

/// The service.
pub struct Enrollment(pub App);

#[tonic::async_trait]
impl EnrollmentService for Enrollment {
    async fn enroll(
        &self,
        request: Request<v1::EnrollRequest>,
    ) -> Result<Response<v1::EnrollResponse>, Status> {
        let request = request.into_inner();
        let public_key = key(&request.public_key)?;
        signing::verify_enrolment(&request).map_err(bad_signature)?;
        let new = NewEnrolment {
            join_token: request.join_token,
            public_key,
            display_name: request.display_name,
        };
        let caller = enroll(&self.0, new).await?;
        Ok(Response::new(v1::EnrollResponse {
            worker_id: caller.worker.to_string(),
            role: role_to_wire(caller.role).into(),
            server_public_key: self.0.key.verifying_key().to_bytes().to_vec(),
        }))
    }

    async fn create_challenge(
        &self,
        request: Request<v1::CreateChallengeRequest>,
    ) -> Result<Response<v1::CreateChallengeResponse>, Status> {
        let key = key(&request.get_ref().public_key)?;
        let challenge = create_challenge(&self.0, &key).await?.to_vec();
        Ok(Response::new(v1::CreateChallengeResponse { challenge }))
    }

    async fn create_session(
        &self,
        request: Request<v1::CreateSessionRequest>,
    ) -> Result<Response<v1::CreateSessionResponse>, Status> {
        let request = request.into_inner();
        if request.challenge.len() != NONCE_BYTES {
            return Err(Error::invalid("challenge", format!("{NONCE_BYTES} bytes")).into());
        }
        let key = key(&request.public_key)?;
        signing::verify_session(&request).map_err(bad_signature)?;
        let session = create_session(&self.0, &key, &request.challenge).await?;
        Ok(Response::new(v1::CreateSessionResponse {
            session_token: session.token,
            expires_ms: session.expires.0,
            worker_id: session.caller.worker.to_string(),
            role: role_to_wire(session.caller.role).into(),
        }))
    }

    async fn create_join_token(
        &self,
        request: Request<v1::CreateJoinTokenRequest>,
    ) -> Result<Response<v1::CreateJoinTokenResponse>, Status> {
        caller(&request)?.require(Role::Maintainer)?;
        let request = request.into_inner();
        let ttl = u64::try_from(request.ttl_ms)
            .map_err(|_| Error::invalid("ttl_ms", "must not be negative"))?;
        let new = NewJoinToken {
            role: role_from_wire(request.role)?,
            uses: request.uses,
            ttl: Duration::from_millis(ttl),
        };
        let app = &self.0;
        let (url, expires) = create_join_token(&app.db, &app.clock, &app.endpoint, new).await?;
        Ok(Response::new(v1::CreateJoinTokenResponse {
            join_url: url.secret_text(),
            expires_ms: expires.0,
        }))
    }
}

fn key(bytes: &[u8]) -> Result<VerifyingKey, Error> {
    let key = parse_public_key(bytes).map_err(|error| Error::invalid("public_key", error))?;
    if key.is_weak() {
        return Err(Error::invalid(
            "public_key",
            "a weak key, anybody could sign for it",
        ));
    }
    Ok(key)
}

fn bad_signature(error: SignatureError) -> Error {
    Error::new(ErrorReason::BadSignature, error.to_string())
}

/// A role as the wire spells it.
#[must_use]
pub const fn role_to_wire(role: Role) -> v1::Role {
    match role {
        Role::Volunteer => v1::Role::Volunteer,
        Role::Evaluator => v1::Role::Evaluator,
        Role::Maintainer => v1::Role::Maintainer,
    }
}

fn role_from_wire(role: i32) -> Result<Role, Error> {
    match cairn_proto::convert::role(role)? {
        v1::Role::Volunteer => Ok(Role::Volunteer),
        v1::Role::Evaluator => Ok(Role::Evaluator),
        v1::Role::Maintainer => Ok(Role::Maintainer),
        v1::Role::Unspecified => Err(Error::invalid("role", "is missing")),
    }
}
