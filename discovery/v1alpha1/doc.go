// Package v1alpha1 is the API group hanse.mesh/v1alpha1, the kinds for which no standard exists: Peer, TrafficPolicy,
// AccessPolicy and Drill. It also holds SPIRE's ClusterFederatedTrustDomain (spire.spiffe.io/v1alpha1), reduced to the
// fields that Hanse uses, so that the same YAML serves a SPIRE controller manager and Hanse.
//
// The types are what people write. Package objects checks them and turns them into the vocabulary of package discovery.
// A field's zero value always means its documented default. Durations are GEP-2257 strings ("250ms", "1m30s").
//
// +groupName=hanse.mesh
// +versionName=v1alpha1
package v1alpha1
