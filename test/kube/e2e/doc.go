// Package e2e takes two real Kubernetes clusters (test/kube/lab) through a mesh's whole life, with the commands that its users type: install,
// inject, join, call, export, restart everything under load, fail over, leave; then one of them with a cluster of plain processes on a machine without Kubernetes (testdata/metal); uninstall;
// and holds that the clusters are then as they were.
// `make e2e-kube` runs it.
package e2e
