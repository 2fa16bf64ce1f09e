package attest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ErrRefused is returned by an Attestor for evidence that proves nothing. Other errors say that it could not be checked.
var ErrRefused = errors.New("the evidence is refused")

func refused(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrRefused, fmt.Errorf(format, args...).Error())
}

// Evidence is what an agent has proven.
type Evidence struct {
	AgentID   spiffeid.ID // below /spire/agent/<type>/
	Selectors []string    // values, of the attestor's type
	// Entry is the one ID that the agent is entitled to. Zero: those that an administrator registers for it.
	Entry spiffeid.ID
}

// Challenge sends a challenge to the agent and returns its answer.
type Challenge func(challenge []byte) (response []byte, err error)

// Attestor checks one type of evidence. What it accepts can be shown again: its agents attest anew instead of renewing.
type Attestor interface {
	Attest(ctx context.Context, payload []byte, challenge Challenge) (Evidence, error)
}

const maxPayload = 64 << 10 // bytes

// decodePayload reads JSON from an agent. Fields that are not known are left aside, as SPIRE does.
func decodePayload(data []byte, into any) error {
	if len(data) > maxPayload {
		return refused("the payload is larger than %d bytes", maxPayload)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(into); err != nil {
		return refused("the payload does not decode: %v", err)
	}
	return nil
}
