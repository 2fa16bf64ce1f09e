package hop

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
)

var (
	// ErrDead is the failure of streams on a connection that answered no PING in time.
	ErrDead = errors.New("no byte and no answer to PING")
	// ErrLost is the failure of streams whose connection broke: their peer has died, or the way to it.
	ErrLost = errors.New("connection lost")
	// ErrDistrusted is the failure of streams whose peer is no longer vouched for by any bundle.
	ErrDistrusted = errors.New("peer's SVID no longer verifies")
	// ErrClosed is returned once Run has returned.
	ErrClosed = errors.New("hop client is closed")
)

// Stage says how far an attempt came.
type Stage string

// Stages.
const (
	StageGateway   Stage = "gateway"   // no gateway could be reached: no fault of the endpoint
	StageConnect   Stage = "connect"   // TCP to the endpoint itself
	StageHandshake Stage = "handshake" // TLS, the peer's identity, or the gateway's alert on the endpoint
	StageStream    Stage = "stream"    // on an established connection
)

// Error is a failure of the hop, never an answer of the peer.
type Error struct {
	Peer    string // SPIFFE ID
	Address netip.AddrPort
	Gateway netip.AddrPort // zero: direct
	Stage   Stage
	Sent    bool // the request may have reached the application
	Err     error
}

// Error implements error.
func (e *Error) Error() string {
	via := ""
	if e.Gateway.IsValid() {
		via = " through gateway " + e.Gateway.String()
	}
	return fmt.Sprintf("hop to %s at %s%s: %s: %v", e.Peer, e.Address, via, e.Stage, e.Err)
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Sent reports whether the request that failed with err may have reached the application.
func Sent(err error) bool {
	var e *Error
	return !errors.As(err, &e) || e.Sent
}

// Silent reports whether err is of somebody who was not heard, neither to agree nor to refuse: it may be in a black hole, with others.
func Silent(err error) bool {
	var e *Error
	if errors.Is(err, ErrDead) || !errors.As(err, &e) || e.Stage == StageStream {
		return errors.Is(err, ErrDead)
	}
	var late net.Error
	return errors.As(e.Err, &late) && late.Timeout()
}
