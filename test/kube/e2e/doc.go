// Package e2e takes two real Kubernetes clusters (test/kube/lab) through a mesh's whole life, with the commands that its users type: install,
// inject, join, call, export, restart everything under load, fail over, leave; then one of them with a cluster of plain processes on a machine without Kubernetes (testdata/metal); uninstall;
// and holds that the clusters are then as they were.
// `make e2e-kube` runs it; `make e2e-kube-more` runs the other tests, each in a process of its own, since a process has one lab: pods without sidecars, upgrades,
// and sidecars from the first moment of a pod to its last.
package e2e
