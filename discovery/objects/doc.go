// Package objects turns Kubernetes objects into a Snapshot, wherever they come from.
//
//	bytes ─► Decode ─► Object ─► Set ─► Merge ─► Build ─► discovery.Snapshot
//	                     ▲                          │
//	          Kubernetes ┘                          ▼ State (IDs and times that outlive a restart)
//
// Decode is strict and bounded, and reports every fault of a file together, each with its line, field, value and remedy.
// Validate holds each object to what its kind promises. A Set is never changed; Put and Delete return another. Build is
// pure: the same Input gives the same Snapshot and State, and services whose objects did not change keep their value.
// A fault that Build finds drops the object that has it, and nothing else.
//
// docs/configuration.md describes the kinds and annotations for their users.
package objects
