package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/hanse-mesh/hanse/proxy/capture"
)

// maxRules is what the kernel takes as one argument of a program (MAX_ARG_STRLEN).
const maxRules = 128 << 10

// Arguments are those of a program, after its name, that asks for the rules of cfg.
func Arguments(cfg *capture.Config) ([]string, error) {
	b, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	if len(b) >= maxRules {
		return nil, fmt.Errorf("the rules are %d bytes: at most %d", len(b), maxRules-1)
	}
	return []string{"capture", "wait", "--rules", string(b)}, nil
}

// Rules decodes what Arguments has after --rules.
func Rules(text []byte) (*capture.Config, error) {
	if len(text) >= maxRules {
		return nil, fmt.Errorf("the rules are larger than %d bytes", maxRules-1)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields() // of a newer version: what cannot be installed whole is not
	var cfg capture.Config
	if err := d.Decode(&cfg); err != nil {
		return nil, fmt.Errorf("decode the rules: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("decode the rules: more follows")
	}
	for _, p := range cfg.Always {
		if !p.IsValid() {
			return nil, errors.New("decode the rules: an address range in Always is none")
		}
	}
	return &cfg, cfg.Validate()
}

// asks says whether a command line is that of a program that asks, and for what.
func asks(cmdline []byte) (rules []byte, ok bool) {
	args := bytes.Split(cmdline, []byte{0})
	if len(args) < 5 || string(args[1]) != "capture" || string(args[2]) != "wait" || string(args[3]) != "--rules" {
		return nil, false
	}
	return args[4], true
}
