//! Enrolment, challenges and sessions.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#[expect(dead_code, reason = "shared with tests that need other parts of it")]
mod support;

use std::time::Duration;

use cairn_coordinator::caller::Role;
use cairn_proto::reason::{self, ErrorReason};
use cairn_proto::signing::{sign_enrolment, sign_session};
use cairn_proto::v1;
use cairn_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use cairn_proto::v1::model_service_client::ModelServiceClient;
use support::{coordinator, key};
use tonic::{Code, Request, Status};

const HOUR: Duration = Duration::from_hours(1);

#[tokio::test]
async fn enrolment_spends_once_and_repeats_for_the_same_key() {
    let fixture = coordinator().await;
    let token = fixture.token(Role::Evaluator, 1).await;
    let first = fixture.enroll(&token, 1).await.unwrap();
    assert_eq!(first.role, Role::Evaluator);
    // The answer got lost: the same key asks again, even after the token's end.
    fixture.app.clock.advance(2 * HOUR);
    let again = fixture.enroll(&token, 1).await.unwrap();
    assert_eq!(again.worker, first.worker);
    // The token's time has come for others, and an enrolled key cannot change its role.
    let error = fixture.enroll(&token, 2).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::TokenExpired);
    let other = fixture.token(Role::Maintainer, 1).await;
    let error = fixture.enroll(&other, 1).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::AlreadyExists);
}

#[tokio::test]
async fn spent_and_unknown_tokens_are_refused_by_name() {
    let fixture = coordinator().await;
    let token = fixture.token(Role::Volunteer, 2).await;
    fixture.enroll(&token, 1).await.unwrap();
    fixture.enroll(&token, 2).await.unwrap();
    let error = fixture.enroll(&token, 3).await.unwrap_err();
    assert_eq!(error.reason(), ErrorReason::TokenSpent);
    for bad in ["", "cairn_join_00", &token[..token.len() - 1]] {
        let error = fixture.enroll(bad, 3).await.unwrap_err();
        assert_eq!(error.reason(), ErrorReason::TokenUnknown, "{bad}");
    }
}

async fn list(
    models: &mut ModelServiceClient<tonic::transport::Channel>,
    token: &str,
) -> Result<(), Status> {
    let mut request = Request::new(v1::ListModelsRequest::default());
    if !token.is_empty() {
        let value = format!("Bearer {token}").parse().unwrap();
        request.metadata_mut().insert("authorization", value);
    }
    models.list_models(request).await.map(|_| ())
}

#[tokio::test]
async fn a_session_is_bought_with_a_signature_and_ends_after_an_hour() {
    let fixture = coordinator().await;
    let channel = fixture.channel().await;
    let mut enrollment = EnrollmentServiceClient::new(channel.clone());
    let mut models = ModelServiceClient::new(channel);

    let mut request = v1::EnrollRequest {
        join_token: fixture.token(Role::Volunteer, 1).await,
        display_name: "ada".into(),
        ..Default::default()
    };
    sign_enrolment(&key(1), &mut request);
    let stolen = v1::EnrollRequest {
        display_name: "eve".into(),
        ..request.clone()
    };
    let refused = enrollment.enroll(stolen).await.unwrap_err();
    assert_eq!(reason::of_status(&refused), Some(ErrorReason::BadSignature));
    let enrolled = enrollment.enroll(request).await.unwrap().into_inner();
    assert_eq!(enrolled.role, v1::Role::Volunteer as i32);

    let public_key = key(1).verifying_key().to_bytes().to_vec();
    let ask = v1::CreateChallengeRequest { public_key };
    let challenge = enrollment
        .create_challenge(ask.clone())
        .await
        .unwrap()
        .into_inner()
        .challenge;
    let signed = sign_session(&key(1), &challenge);
    let session = enrollment
        .create_session(signed.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(session.worker_id, enrolled.worker_id);
    let replayed = enrollment.create_session(signed).await.unwrap_err();
    assert_eq!(
        reason::of_status(&replayed),
        Some(ErrorReason::ChallengeInvalid)
    );

    // A challenge lasts a minute.
    let late = enrollment
        .create_challenge(ask)
        .await
        .unwrap()
        .into_inner()
        .challenge;
    fixture.app.clock.advance(Duration::from_secs(61));
    let late = enrollment
        .create_session(sign_session(&key(1), &late))
        .await
        .unwrap_err();
    assert_eq!(
        reason::of_status(&late),
        Some(ErrorReason::ChallengeInvalid)
    );

    list(&mut models, &session.session_token).await.unwrap();
    assert_eq!(
        list(&mut models, "").await.unwrap_err().code(),
        Code::Unauthenticated
    );
    let (start, last) = session
        .session_token
        .split_at(session.session_token.len() - 1);
    let other = if last == "0" { "1" } else { "0" };
    let forged = format!("{start}{other}");
    assert_eq!(
        list(&mut models, &forged).await.unwrap_err().code(),
        Code::Unauthenticated
    );
    fixture.app.clock.advance(HOUR);
    let ended = list(&mut models, &session.session_token).await.unwrap_err();
    assert_eq!(reason::of_status(&ended), Some(ErrorReason::SessionExpired));
}

#[tokio::test]
async fn unknown_keys_get_no_challenge_and_known_ones_only_so_many() {
    let fixture = coordinator().await;
    let mut enrollment = EnrollmentServiceClient::new(fixture.channel().await);
    let ask = |seed: u8| v1::CreateChallengeRequest {
        public_key: key(seed).verifying_key().to_bytes().to_vec(),
    };
    let refused = enrollment.create_challenge(ask(9)).await.unwrap_err();
    assert_eq!(reason::of_status(&refused), Some(ErrorReason::KeyUnknown));
    fixture.member(Role::Volunteer, 1).await;
    for _ in 0..16 {
        enrollment.create_challenge(ask(1)).await.unwrap();
    }
    let refused = enrollment.create_challenge(ask(1)).await.unwrap_err();
    assert_eq!(reason::of_status(&refused), Some(ErrorReason::TooMany));
}

#[tokio::test]
async fn only_maintainers_make_join_tokens() {
    let fixture = coordinator().await;
    let mut enrollment = EnrollmentServiceClient::new(fixture.channel().await);
    let request = v1::CreateJoinTokenRequest {
        role: 1,
        ..Default::default()
    };
    let refused = enrollment.create_join_token(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn health_and_reflection_need_no_session() {
    let fixture = coordinator().await;
    let channel = fixture.channel().await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let answer = health
        .check(tonic_health::pb::HealthCheckRequest {
            service: String::new(),
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(answer.status, 1);
}
