// Package kube reads the objects of a Kubernetes API server, and keeps them as the Set that package objects builds Snapshots from.
//
//	API server ─► one reflector a kind ─► trimmed objects ─┬─► Set ─► objects.Build ─► Snapshot
//	              Pods, Nodes ─► whose, where, how reached ┘
//
// Lists are streamed where the server can (KEP-3157), paged otherwise, and objects are trimmed before they are kept. Kinds that
// are CustomResourceDefinitions are read while these exist: none of them need be installed. EndpointSlices of Pods are given what
// package objects reads from annotations: the Pod's service account, whether it has a sidecar, the Node's region.
//
// A server that is away, restarts or forgets a watch costs freshness and nothing else: an object leaves only by its DELETE, by a
// completed list, or with its CustomResourceDefinition. An object that became invalid keeps its last valid state in force.
// Source.Run owns every goroutine here and returns after they have ended.
package kube
