// Package inject puts a sidecar into Pods.
//
//	Pod ─► Wanted ─► Values.Pod ─► the same Pod with
//	                                init container  hanse-capture (nftables, CAP_NET_ADMIN)
//	                                native sidecar  hanse-proxy   (init container that restarts: there before the application, gone after it)
//	                                volumes, probes led through the sidecar, annotations
//
// It is a function of the Pod and the Values alone: the webhook of hansed and `hanse inject` give the same.
package inject
