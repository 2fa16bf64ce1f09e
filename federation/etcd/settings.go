package etcd

import "time"

// Both ends of a federation connection ping after keepaliveTime of silence and give up keepaliveTimeout later: a black hole is
// known after 15 s at most.
const (
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 5 * time.Second
)
