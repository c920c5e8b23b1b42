"""Cases from people's practice (../shared/cases, where it lies beside the repository): each one is a test."""
import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GIVEN = TESTS.parent.parent/'shared'/'cases'

# case -> file and tests that hold what is wanted of it
CASES = {
    '01-no-git': ('runs/test_run_folder.py', 'test_a_machine_without_git_finishes_its_runs'),
    '02-papermill-equals': ('training/test_config.py',
                            'test_papermill_reads_every_cell_of_parameters_itself'),
    '03-wheel': ('runs/test_wheel.py', 'test_what_a_wheel_holds',
                 'test_commands_of_a_wheel_in_an_empty_folder'),
    '05-motion-photo': ('data/test_cases_data.py', 'test_a_film_behind_a_phone_picture_is_left_alone'),
    '06-kaggle-flickr8k': ('data/test_cases_data.py', 'test_kaggles_flickr8k'),
    '07-hf-imagefolder': ('data/test_cases_data.py', 'test_hugging_faces_imagefolder',
                          'test_a_picture_in_val_and_in_test_is_said_one_of_train_is_refused'),
    '08-more-than-five': ('data/test_cases_data.py', 'test_papers_rank_the_first_five_captions',
                          'test_more_than_five_captions_are_said'),
    '10-scripts-words': ('data/test_cases_data.py', 'test_marks_stay_with_their_letters',
                         'test_sentences_that_are_one_long_word_are_noticed'),
    '11-scan-no-ids': ('data/test_cases_data.py', 'test_scan_without_ids'),
    '14-families': ('models/test_families.py', 'test_a_family_trains_saves_and_loads',
                    'test_the_halves_are_the_pair',
                    'test_what_is_not_supported_is_refused_by_name_before_data_are_opened'),
    '19-kernel-start': ('runs/test_edges.py', 'test_a_kernel_that_cannot_start',
                        'test_a_sweep_whose_kernels_cannot_start'),
    '21-zip-in-git': ('runs/test_run_folder.py', 'test_no_commit_where_the_repository_is_anothers'),
    '30-scores': ('data/test_cases_data.py', 'test_scores_in_every_form', 'test_scores_that_cannot_be_ranked',
                  'test_some_questions_against_the_whole_gallery',
                  'test_galleries_with_photos_nobody_asks_for'),
    '35-results-with-bars': ('data/test_cases_data.py', 'test_flickr30ks_results_with_bars'),
    '40-real-eccv-labels': ('metrics/test_eccv_caption.py', 'test_lists_give_what_the_package_gives',
                            'test_5k_and_1k_give_what_the_package_gives')}


@pytest.mark.parametrize('case', CASES)
def test_a_case_is_a_test(case):
    file, *names = CASES[case]
    tree = ast.parse((TESTS/file).read_text('utf-8'))
    there = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
    assert names and not set(names) - there.keys()
    slow = [n for n in names if 'mark.slow' in ''.join(map(ast.unparse, there[n].decorator_list))]
    assert not slow, 'a case is tested at every change'


def test_no_case_is_forgotten():
    if not GIVEN.is_dir(): pytest.skip('no ../shared/cases')
    given = {p.stem for p in GIVEN.iterdir() if re.match(r'\d', p.name)}
    assert given == set(CASES) - {'35-results-with-bars'}        # that one is described, and made by its test
